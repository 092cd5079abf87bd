"""Around MLA's products, one launch each: norms of both latents, rotary and the KV write; rotary of the queries.

`append_latents` takes what the down projection gives, `rotate_queries` what the query's up projection gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def norm_row(x, weight, at, eps, SIZE: tl.constexpr):
    """RMS norm of one row in float32, rounded to x's dtype as a norm of its own would leave it."""
    y = x.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    return (y * tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)).to(x.dtype)


@triton.jit
def _append_latents_kernel(q_out, cache, down, q_weight, kv_weight, cos, sin, kv_rows, eps, latent_scale, down_row, q_row,
                           cache_row, rope_row, Q: tl.constexpr, KV: tl.constexpr, ROPE: tl.constexpr,
                           INTERLEAVED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
                           BLOCK_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (t, 0) does token t's KV, program (t, 1) its query latent."""
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    row = down + token * down_row
    if tl.program_id(1) == 1:
        if q_weight is not None:
            j = tl.arange(0, BLOCK_Q)
            query = tl.load(row + j, mask=j < Q, other=0.0)
            start_next(PDL, LOADED)
            tl.store(q_out + token * q_row + j, norm_row(query, q_weight, j, eps, Q), mask=j < Q)
    else:
        target = cache + tl.load(kv_rows + token).to(tl.int64) * cache_row
        i = tl.arange(0, BLOCK_KV)
        x = tl.load(row + Q + i, mask=i < KV, other=0.0)
        start_next(PDL, LOADED)
        latent = norm_row(x, kv_weight, i, eps, KV)
        if latent_scale != 1.0:
            latent = (latent.to(tl.float32) * latent_scale).to(x.dtype)
        tl.store(target + i, latent.to(cache.dtype.element_ty), mask=i < KV)

        d = tl.arange(0, BLOCK_R)
        inside = d < ROPE
        if INTERLEAVED:
            other = d ^ 1
        else:
            other = tl.where(d < ROPE // 2, d + ROPE // 2, d - ROPE // 2)
        k = tl.load(row + Q + KV + d, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(row + Q + KV + other, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + token * rope_row + d, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sin + token * rope_row + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + KV + d, (k * c + p * s).to(x.dtype).to(cache.dtype.element_ty), mask=inside)


def append_latents(
    down: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    cache: Tensor,
    *,
    eps: float,
    latent_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor | None:
    """down [T, Q + C + R] (query latent, KV latent, rotary key; Q = 0 without `q_weight`), q_weight [Q], kv_weight [C], cos
    and sin [T, 1, R] → the normed query latent [T, Q], or None.

    The normed KV latent, times `latent_scale`, and the rotated key go to rows kv_rows [T] int64 of cache [rows, C + R].
    Reference: `PlainOps.rms_norm`, `PlainOps.rotary`, `Tensor.index_copy_`.
    """
    tokens = down.shape[0]
    kv, rope = kv_weight.shape[0], cos.shape[-1]
    q = 0 if q_weight is None else q_weight.shape[0]
    out = down.new_empty(tokens, q) if q else None
    launch(
        _append_latents_kernel, (tokens, 2 if q else 1), out, cache, down, q_weight, kv_weight, cos, sin, kv_rows, eps,
        latent_scale, down.stride(0), q, cache.stride(0), cos.stride(0),
        Q=q, KV=kv, ROPE=rope, INTERLEAVED=interleaved, BLOCK_Q=power_of_2(max(q, 1)), BLOCK_KV=power_of_2(kv),
        BLOCK_R=power_of_2(rope), num_warps=4, **programmatic(down.device),
    )  # fmt: skip
    return out


@triton.jit
def _rotate_queries_kernel(out, x, cos, sin, x_row, x_head, out_row, out_head, rope_row, HEADS: tl.constexpr,
                           ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
                           PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_R)
    if INTERLEAVED:
        other = d ^ 1
    else:
        other = tl.where(d < ROPE // 2, d + ROPE // 2, d - ROPE // 2)
    inside = (head < HEADS)[:, None] & (d < ROPE)[None, :]
    at = x + token * x_row + (head * x_head)[:, None]
    y = tl.load(at + d[None, :], mask=inside, other=0.0)
    p = tl.load(at + other[None, :], mask=inside, other=0.0)
    c = tl.load(cos + token * rope_row + d, mask=d < ROPE, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * rope_row + d, mask=d < ROPE, other=0.0).to(tl.float32)[None, :]
    # `out` may be x: every thread has read before any writes.
    tl.debug_barrier()
    start_next(PDL, LOADED)
    rotated = (y.to(tl.float32) * c + p.to(tl.float32) * s).to(out.dtype.element_ty)
    tl.store(out + token * out_row + (head * out_head)[:, None] + d[None, :], rotated, mask=inside)


def rotate_queries(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, interleaved: bool = False) -> None:
    """x [T, H, R], any strides but a contiguous last dimension, rotated into `out` of the same shape, which may be x itself.
    cos, sin [T, 1, R]. Reference: `PlainOps.rotary`."""
    tokens, heads, rope = x.shape
    block_h = min(16, power_of_2(heads))
    launch(
        _rotate_queries_kernel, (tokens, -(-heads // block_h)), out, x, cos, sin, x.stride(0), x.stride(1), out.stride(0),
        out.stride(1), cos.stride(0), HEADS=heads, ROPE=rope, INTERLEAVED=interleaved, BLOCK_H=block_h,
        BLOCK_R=power_of_2(rope), num_warps=2, **programmatic(x.device),
    )  # fmt: skip
