"""Into and out of the FP8 cache, one launch each: quantise-and-append, query quantisation (with rotary), fetch-and-dequantise.

One program a token (or query row). The arithmetic is `reference.quantise_reference`'s. `append.append_norms` begins with what
the down projection gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..triton.language import FIRST, LOADED, start_next, wait_for_inputs
from ..triton.launch import launch, programmatic
from .layout import LATENT, PAGE, ROPE, Fp8Planes

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = tl.constexpr(448.0)
MIN_SCALE = tl.constexpr(2.0**-40)
MAX_SCALE = tl.constexpr(2.0**30)
ROPE_MAX = tl.constexpr(2.0**30)


def append(planes: Fp8Planes, latent: Tensor, rope: Tensor, rows: Tensor) -> None:
    """Quantise tokens, latent [T, 512] and rope [T, 64] (last dimension contiguous, float types), and write them at token rows
    `rows` [T] int64 (page · 64 + offset). Inert rows point at a scratch page; what several of them leave there is
    any one of them or a mixture, always finite."""
    tokens = latent.shape[0]
    if tokens:
        launch(
            _append, (tokens,),
            latent, rope, rows, planes.latent, planes.scale, planes.rope, latent.stride(0), rope.stride(0),
            planes.latent.stride(0), planes.scale.stride(0), planes.rope.stride(0),
            LATENT=LATENT, ROPE=ROPE, PAGE=PAGE, num_warps=1,
        )  # fmt: skip


def quantise_query(
    q_latent: Tensor,
    q_rope: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """q_latent [T, H, 512], q_rope [T, H, 64] (last dimension contiguous) → E4M3 [T, H, 512], BF16 [T, H, 64] divided by
    the scale, scale [T, H] float32.

    With rotary (cos and sin of the rows, [T, 1, 64] each, as `layers.rotary.Rotary.rows` gives them), q_rope is rotated
    first: pairs (2i, 2i + 1) if `interleaved`, else (i, i + 32). Reference: `PlainOps.rotary`, `quantise_reference`."""
    tokens, heads, _ = q_latent.shape
    content = torch.empty(tokens, heads, LATENT, dtype=torch.float8_e4m3fn, device=q_latent.device)
    aligned = torch.empty(tokens, heads, ROPE, dtype=torch.bfloat16, device=q_latent.device)
    scale = torch.empty(tokens, heads, dtype=torch.float32, device=q_latent.device)
    rotate = 0 if rotary is None else (1 if interleaved else 2)
    cos, sin = rotary or (scale, scale)
    if tokens:
        launch(
            _quantise_query, (tokens, heads),
            q_latent, q_rope, cos, sin, content, aligned, scale,
            q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), cos.stride(0), heads,
            ROTATE=rotate, LATENT=LATENT, ROPE=ROPE, num_warps=1, **programmatic(q_latent.device),
        )  # fmt: skip
    return content, aligned, scale


def fetch(
    planes: Fp8Planes,
    rows: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    """Token rows [T] int64 → [T, 576] in `dtype`: latent, then rotary key, dequantised (for prefill over a cached prefix).
    With `out` [R, 576], contiguous, and `out_rows` [T] int64: to those rows of it."""
    if out is None:
        out = torch.empty(rows.shape[0], LATENT + ROPE, dtype=dtype, device=rows.device)
    # Launched for no rows too, which runs nothing: kernels that are compiled ahead are those of a first, short prompt.
    launch(
        _fetch, (rows.shape[0],),
        out, out_rows, rows, planes.latent, planes.scale, planes.rope,
        planes.latent.stride(0), planes.scale.stride(0), planes.rope.stride(0),
        LATENT=LATENT, ROPE=ROPE, PAGE=PAGE, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def content_scale(content, rope):
    least = tl.maximum(tl.max(tl.abs(content), 0) / E4M3_MAX, tl.max(tl.abs(rope), 0) / ROPE_MAX)
    bits = tl.minimum(tl.maximum(least, MIN_SCALE), MAX_SCALE).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(content, scale):
    return tl.minimum(tl.maximum(content / scale, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def aligned_rope(rope, scale):
    return tl.minimum(tl.maximum(rope / scale, -ROPE_MAX), ROPE_MAX).to(tl.bfloat16)


@triton.jit
def _append(
    latent, rope, rows, out_latent, out_scale, out_rope, latent_stride, rope_stride, page_latent, page_scale, page_rope,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    content = tl.load(latent + token * latent_stride + c).to(tl.float32)
    turned = tl.load(rope + token * rope_stride + r).to(tl.float32)
    scale = content_scale(content, turned)
    row = tl.load(rows + token)
    page = row // PAGE
    offset = row % PAGE
    tl.store(out_latent + page * page_latent + offset * LATENT + c, to_e4m3(content, scale))
    tl.store(out_scale + page * page_scale + offset, scale)
    tl.store(out_rope + page * page_rope + offset * ROPE + r, aligned_rope(turned, scale))


@triton.jit
def _quantise_query(
    q_latent, q_rope, cos, sin, out_latent, out_rope, out_scale, latent_token, latent_head, rope_token, rope_head, cos_row,
    heads, ROTATE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    head = tl.program_id(1)
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    HALF: tl.constexpr = ROPE // 2
    content = tl.load(q_latent + token * latent_token + head * latent_head + c).to(tl.float32)
    base = q_rope + token * rope_token + head * rope_head
    turned = tl.load(base + r).to(tl.float32)
    if ROTATE:
        if ROTATE == 1:
            partner = r ^ 1
        else:
            partner = r ^ HALF
        other = tl.load(base + partner).to(tl.float32)
        turned = turned * tl.load(cos + token * cos_row + r).to(tl.float32)
        turned += other * tl.load(sin + token * cos_row + r).to(tl.float32)
    start_next(PDL, LOADED)
    scale = content_scale(content, turned)
    row = token * heads + head
    tl.store(out_latent + row * LATENT + c, to_e4m3(content, scale))
    tl.store(out_rope + row * ROPE + r, aligned_rope(turned, scale))
    tl.store(out_scale + row, scale)


@triton.jit
def _fetch(
    out, out_rows, rows, latent, scale, rope, page_latent, page_scale, page_rope,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    row = tl.load(rows + token)
    page = row // PAGE
    offset = row % PAGE
    factor = tl.load(scale + page * page_scale + offset)
    content = tl.load(latent + page * page_latent + offset * LATENT + c).to(tl.float32)
    turned = tl.load(rope + page * page_rope + offset * ROPE + r).to(tl.float32)
    if out_rows is not None:
        token = tl.load(out_rows + token)
    target = out + token * (LATENT + ROPE)
    tl.store(target + c, (content * factor).to(out.dtype.element_ty))
    tl.store(target + LATENT + r, (turned * factor).to(out.dtype.element_ty))
