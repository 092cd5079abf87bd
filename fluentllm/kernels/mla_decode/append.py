"""From MLA's down projections into the FP8 cache in one launch: norm of the KV latent, rotary, quantisation, the KV write.

What `triton.mla_rows.append_latents` and `triton.mla_absorb.absorb` are for a cache of 16 bits. Prefill also gets the tokens as
they were before quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..triton.language import FIRST, LOADED, start_next, wait_for_inputs
from ..triton.launch import launch, programmatic
from ..triton.mla_absorb import absorb_tile, absorb_tiles
from ..triton.mla_rows import norm_row
from ..triton.rotate import partner
from .layout import LATENT, PAGE, ROPE, Fp8Planes
from .quantise import aligned_rope, content_scale, to_e4m3

if TYPE_CHECKING:
    from torch import Tensor


def append_norms(
    kv: Tensor,
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
) -> None:
    """kv [T, 512 + 64] (KV latent, rotary key; rows at any distance), kv_weight [512], cos and sin [T, 1, 64].

    The normed KV latent, times `latent_scale`, and the rotated key are quantised and written at token rows `rows` [T] int64
    (page · 64 + offset); with `plain` [R, 576], contiguous, and `plain_rows` [T] int64 also to those rows of it, as they are.
    Reference: `PlainOps.rms_norm`, `PlainOps.rotary`, `reference.append_reference`.
    """
    launch(
        _append_norms, (kv.shape[0],),
        planes.latent, planes.scale, planes.rope, plain, kv, kv_weight, cos, sin, rows, plain_rows, eps, latent_scale,
        kv.stride(0), cos.stride(0), planes.latent.stride(0), planes.scale.stride(0), planes.rope.stride(0),
        LATENT=LATENT, ROPE=ROPE, PAGE=PAGE, INTERLEAVED=interleaved, num_warps=4, **programmatic(kv.device),
    )  # fmt: skip


def absorb_norms(
    q: Tensor,
    up_k: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    planes: Fp8Planes,
    *,
    eps: float,
    latent_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """q [T, H, nope + 64] (last dimension contiguous), up_k [H, nope, 512] contiguous → q's first part times up_k [T, H, 512],
    contiguous; in the same launch what `append_norms` does with the rest.

    Queries are quantised by `quantise_query`, a launch of its own: the scale is that of all 512 columns of a head. A program
    with all of them would read 128 KB of weights, 1.2 µs of a multiprocessor's share of L2 at its best, and at 16 heads leave
    most of the chip idle; to find the scale across programs takes a write, a barrier and an atomic, which is longer than a
    programmatic launch.
    Reference: `torch.bmm`; `append_norms`'.
    """
    tokens, heads, _ = q.shape
    nope = up_k.shape[1]
    out = q.new_empty(tokens, heads, LATENT)
    tiles, sizes = absorb_tiles(tokens, heads, nope, LATENT)
    launch(
        _absorb_norms, (tokens + tiles,),
        out, planes.latent, planes.scale, planes.rope, q, up_k, kv, kv_weight, cos, sin, rows, eps, latent_scale, tokens,
        q.stride(0), q.stride(1), kv.stride(0), cos.stride(0),
        planes.latent.stride(0), planes.scale.stride(0), planes.rope.stride(0),
        HEADS=heads, NOPE=nope, LATENT=LATENT, ROPE=ROPE, PAGE=PAGE, INTERLEAVED=interleaved, num_warps=4, **sizes,
        **programmatic(q.device),
    )  # fmt: skip
    return out


@triton.jit
def _quantise_row(
    out_latent, out_scale, out_rope, plain, kv, kv_weight, cos, sin, rows, plain_rows, token, eps, latent_scale, kv_row,
    rope_row, page_latent, page_scale, page_rope, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token. Waits for the kernels in front by itself."""
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    factor = tl.load(kv_weight + c).to(tl.float32)
    wait_for_inputs(PDL)
    row = tl.load(rows + token)
    given = kv + token * kv_row
    x = tl.load(given + c)
    key = tl.load(given + LATENT + r).to(tl.float32)
    other = tl.load(given + LATENT + partner(r, ROPE, INTERLEAVED)).to(tl.float32)
    key = key * tl.load(cos + token * rope_row + r).to(tl.float32)
    key += other * tl.load(sin + token * rope_row + r).to(tl.float32)
    start_next(PDL, LOADED)
    latent = norm_row(x, factor, eps, LATENT)
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
    page = row // PAGE
    offset = row % PAGE
    tl.store(out_latent + page * page_latent + offset * LATENT + c, to_e4m3(content, scale))
    tl.store(out_scale + page * page_scale + offset, scale)
    tl.store(out_rope + page * page_rope + offset * ROPE + r, aligned_rope(turned, scale))


@triton.jit
def _append_norms(
    out_latent, out_scale, out_rope, plain, kv, kv_weight, cos, sin, rows, plain_rows, eps, latent_scale, kv_row, rope_row,
    page_latent, page_scale, page_rope, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL, FIRST)
    _quantise_row(
        out_latent, out_scale, out_rope, plain, kv, kv_weight, cos, sin, rows, plain_rows, tl.program_id(0).to(tl.int64), eps,
        latent_scale, kv_row, rope_row, page_latent, page_scale, page_rope, LATENT, ROPE, PAGE, INTERLEAVED, PDL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _absorb_norms(
    out, out_latent, out_scale, out_rope, q, up_k, kv, kv_weight, cos, sin, rows, eps, latent_scale, tokens, q_row, q_head,
    kv_row, rope_row, page_latent, page_scale, page_rope, HEADS: tl.constexpr, NOPE: tl.constexpr, LATENT: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first programs do a token each, all others a tile of the product."""
    pid = tl.program_id(0)
    start_next(PDL, FIRST)
    if pid < tokens:
        _quantise_row(
            out_latent, out_scale, out_rope, None, kv, kv_weight, cos, sin, rows, None, pid.to(tl.int64), eps, latent_scale,
            kv_row, rope_row, page_latent, page_scale, page_rope, LATENT, ROPE, PAGE, INTERLEAVED, PDL,
        )  # fmt: skip
    else:
        absorb_tile(out, q, up_k, pid - tokens, tokens, q_row, q_head, HEADS, NOPE, LATENT, BLOCK_K, BLOCK_C, BLOCK_T, PDL)
