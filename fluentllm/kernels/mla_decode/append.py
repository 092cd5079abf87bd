"""From MLA's down projections into the FP8 cache in one launch: norms of both latents, rotary, quantisation, the KV write.

What `triton.mla_rows.append_latents` is for a cache of 16 bits. Prefill also gets the tokens as they were before quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..triton.language import FIRST, LOADED, start_next, wait_for_inputs
from ..triton.launch import launch, power_of_2, programmatic
from ..triton.mla_rows import norm_row
from .layout import LATENT, PAGE, ROPE, Fp8Planes
from .quantise import aligned_rope, content_scale, to_e4m3

if TYPE_CHECKING:
    from torch import Tensor


def append_norms(
    down: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    planes: Fp8Planes,
    *,
    eps: float,
    latent_scale: float = 1.0,
    interleaved: bool = False,
    plain: Tensor | None = None,
    plain_rows: Tensor | None = None,
) -> Tensor | None:
    """down [T, Q + 512 + 64] (query latent, KV latent, rotary key; Q = 0 without `q_weight`), q_weight [Q], kv_weight [512],
    cos and sin [T, 1, 64] → the normed query latent [T, Q], or None.

    The normed KV latent, times `latent_scale`, and the rotated key are quantised and written at token rows `rows` [T] int64
    (page · 64 + offset); with `plain` [R, 576], contiguous, and `plain_rows` [T] int64 also to those rows of it, as they are.
    Reference: `PlainOps.rms_norm`, `PlainOps.rotary`, `reference.append_reference`.
    """
    tokens = down.shape[0]
    q = 0 if q_weight is None else q_weight.shape[0]
    out = down.new_empty(tokens, q) if q else None
    launch(
        _append_norms, (tokens, 2 if q else 1),
        out, planes.latent, planes.scale, planes.rope, plain, down, q_weight, kv_weight, cos, sin, rows, plain_rows, eps,
        latent_scale, down.stride(0), q, cos.stride(0),
        planes.latent.stride(0), planes.scale.stride(0), planes.rope.stride(0),
        Q=q, LATENT=LATENT, ROPE=ROPE, PAGE=PAGE, INTERLEAVED=interleaved, BLOCK_Q=power_of_2(max(q, 1)), num_warps=4,
        **programmatic(down.device),
    )  # fmt: skip
    return out


@triton.jit
def _append_norms(
    q_out, out_latent, out_scale, out_rope, plain, down, q_weight, kv_weight, cos, sin, rows, plain_rows, eps, latent_scale,
    down_row, q_row, rope_row, page_latent, page_scale, page_rope, Q: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    PAGE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_Q: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) does token t's KV, program (t, 1) its query latent."""
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    given = down + token * down_row
    if tl.program_id(1) == 1:
        if q_weight is not None:
            j = tl.arange(0, BLOCK_Q)
            query = tl.load(given + j, mask=j < Q, other=0.0)
            start_next(PDL, LOADED)
            tl.store(q_out + token * q_row + j, norm_row(query, q_weight, j, eps, Q), mask=j < Q)
    else:
        c = tl.arange(0, LATENT)
        r = tl.arange(0, ROPE)
        if INTERLEAVED:
            partner = r ^ 1
        else:
            partner = r ^ (ROPE // 2)
        x = tl.load(given + Q + c)
        key = tl.load(given + Q + LATENT + r).to(tl.float32)
        other = tl.load(given + Q + LATENT + partner).to(tl.float32)
        key = key * tl.load(cos + token * rope_row + r).to(tl.float32)
        key += other * tl.load(sin + token * rope_row + r).to(tl.float32)
        start_next(PDL, LOADED)
        latent = norm_row(x, kv_weight, c, eps, LATENT)
        if latent_scale != 1.0:
            latent = (latent.to(tl.float32) * latent_scale).to(x.dtype)
        # Rounded as a cache of 16 bits would have them: both caches then keep the same values, one of them quantised.
        turned = key.to(x.dtype)
        if plain is not None:
            target = plain + tl.load(plain_rows + token) * (LATENT + ROPE)
            tl.store(target + c, latent.to(plain.dtype.element_ty))
            tl.store(target + LATENT + r, turned.to(plain.dtype.element_ty))
        content = latent.to(tl.float32)
        turned = turned.to(tl.float32)
        scale = content_scale(content, turned)
        row = tl.load(rows + token)
        page = row // PAGE
        offset = row % PAGE
        tl.store(out_latent + page * page_latent + offset * LATENT + c, to_e4m3(content, scale))
        tl.store(out_scale + page * page_scale + offset, scale)
        tl.store(out_rope + page * page_rope + offset * ROPE + r, aligned_rope(turned, scale))
