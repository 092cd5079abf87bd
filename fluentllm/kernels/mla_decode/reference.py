"""MLA decode in plain torch: what every kernel of this package is compared with, on any device and in any precision.

A sequence has q query rows (1 for decoding, more for verification); row j attends to the keys at positions
≤ length - q + j. Rows are absorbed queries: q_nope @ up_k, 512 wide, beside the rotary part.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .layout import E4M3_MAX, MAX_SCALE, MIN_SCALE, PAGE, ROPE_MAX, Fp8Planes

if TYPE_CHECKING:
    from torch import Tensor


def token_scale(latent: Tensor, rope: Tensor) -> Tensor:
    """[…, C], […, R] → […] float32: the content scale of a token or of a query row, the least power of two that
    brings the latent under E4M3's 448 (and the rotary part, divided by it, into BF16)."""
    least = torch.maximum(latent.float().abs().amax(-1) / E4M3_MAX, rope.float().abs().amax(-1) / ROPE_MAX)
    bits = least.clamp(MIN_SCALE, MAX_SCALE).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def quantise_reference(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[…, C], […, R] → E4M3 […, C], BF16 […, R] = rope / scale, scale […] float32 (SnapMLA, arXiv 2602.10718,
    eq. 6, with a floor under the scale)."""
    scale = token_scale(latent, rope)
    content = (latent.float() / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return content, (rope.float() / scale[..., None]).clamp(-ROPE_MAX, ROPE_MAX).to(torch.bfloat16), scale


def append_reference(planes: Fp8Planes, latent: Tensor, rope: Tensor, rows: Tensor) -> None:
    """Quantise tokens [T, C], [T, R] and write them at token rows `rows` [T] (page · page size + offset)."""
    content, aligned, scale = quantise_reference(latent, rope)
    page, offset = rows // planes.page, rows % planes.page
    planes.latent.view(torch.uint8)[page, offset] = content.view(torch.uint8)
    planes.scale[page, offset] = scale
    planes.rope[page, offset] = aligned


def fetch_reference(planes: Fp8Planes, rows: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Token rows [T] → latent [T, C], rotary [T, R], dequantised."""
    page, offset = rows // planes.page, rows % planes.page
    scale = planes.scale[page, offset].to(dtype)[:, None]
    content = planes.latent.view(torch.uint8)[page, offset].view(torch.float8_e4m3fn)
    return content.to(dtype) * scale, planes.rope[page, offset].to(dtype) * scale


def gather_tokens(table: Tensor, length: int, page: int = PAGE) -> Tensor:
    """Token rows of a sequence's first `length` keys, from its page table row [P]."""
    positions = torch.arange(length, device=table.device)
    return table.long()[positions // page] * page + positions % page


def attend(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, scale: float, dtype: torch.dtype, first_key: int = 0
) -> Tensor:
    """One sequence: q [q, H, C], [q, H, R], keys [L, C], [L, R] → [q, H, C] in `dtype`. Rows without a visible
    key are zero; keys before `first_key` are not visible."""
    queries, heads, _ = q_latent.shape
    length = latent.shape[0]
    if length == 0:
        return torch.zeros(queries, heads, latent.shape[1], dtype=dtype, device=q_latent.device)
    logits = torch.einsum("qhc,lc->qhl", q_latent.to(dtype), latent.to(dtype))
    logits = (logits + torch.einsum("qhc,lc->qhl", q_rope.to(dtype), rope.to(dtype))) * scale
    limit = length - queries + torch.arange(queries, device=logits.device)
    index = torch.arange(length, device=logits.device)[None, :]
    hidden = (index > limit[:, None]) | (index < first_key)
    probs = logits.masked_fill(hidden[:, None, :], -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("qhl,lc->qhc", probs, latent.to(dtype))


def decode_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor | Fp8Planes,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """q_latent [N, q, H, 512], q_rope [N, q, H, 64]; cache BF16 [pages, 64, 576] or FP8 planes; page_table [N, P];
    lengths [N] (keys, the q new ones included; 0 for an inert sequence) → [N, q, H, 512] in `dtype`."""
    outputs = []
    for i, length in enumerate(lengths.tolist()):
        rows = gather_tokens(page_table[i], length, cache.page if isinstance(cache, Fp8Planes) else cache.shape[1])
        if isinstance(cache, Fp8Planes):
            latent, rope = fetch_reference(cache, rows, dtype)
        else:
            tokens = cache.flatten(0, 1)[rows].to(dtype)
            latent, rope = tokens.split((q_latent.shape[-1], q_rope.shape[-1]), -1)
        outputs.append(attend(q_latent[i], q_rope[i], latent, rope, scale, dtype))
    return torch.stack(outputs)


def quantised_query(q_latent: Tensor, q_rope: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """What a query row is worth after `quantise_reference`: for emulating the FP8 kernels in high precision."""
    content, aligned, scale = quantise_reference(q_latent, q_rope)
    factor = scale.to(dtype)[..., None]
    return content.to(dtype) * factor, aligned.to(dtype) * factor
