"""Around MLA's products, one launch each: norm of the KV latent, rotary and the KV write; rotary of the queries.

`append_latents` takes what the down projection gives, `rotate_queries` what the query's up projection gives; in decode, where
nobody waits for the KV in between, one launch does both. For few tokens that is `mla_absorb`'s, which shares what is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .rotate import partner

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def norm_row(x, factor, eps, SIZE: tl.constexpr):
    """RMS norm of one row, factor float32 its weight, in float32; rounded to x's dtype as a norm of its own would leave it."""
    y = x.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    return (y * factor).to(x.dtype)


@triton.jit
def append_row(cache, kv, kv_weight, cos, sin, kv_rows, token, eps, latent_scale, kv_row, cache_row, rope_row, KV: tl.constexpr,
               ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_R: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """One token's latent [KV] and the rotary key behind it: norm, scale, rotary. Waits for the kernels in front by itself."""
    i = tl.arange(0, BLOCK_KV)
    d = tl.arange(0, BLOCK_R)
    inside = d < ROPE
    factor = tl.load(kv_weight + i, mask=i < KV, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    target = cache + tl.load(kv_rows + token).to(tl.int64) * cache_row
    row = kv + token * kv_row
    x = tl.load(row + i, mask=i < KV, other=0.0)
    k = tl.load(row + KV + d, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(row + KV + partner(d, ROPE, INTERLEAVED), mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * rope_row + d, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + token * rope_row + d, mask=inside, other=0.0).to(tl.float32)
    start_next(PDL, LOADED)
    latent = norm_row(x, factor, eps, KV)
    if latent_scale != 1.0:
        latent = (latent.to(tl.float32) * latent_scale).to(x.dtype)
    tl.store(target + i, latent.to(cache.dtype.element_ty), mask=i < KV)
    tl.store(target + KV + d, (k * c + p * s).to(x.dtype).to(cache.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(out, x, cos, sin, first, x_head, out_head, HEADS: tl.constexpr, ROPE: tl.constexpr,
                 INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Heads `first` … of one token; all four pointers are at its rows. `out` may be x."""
    head = first + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_R)
    inside = (head < HEADS)[:, None] & (d < ROPE)[None, :]
    at = x + (head * x_head)[:, None]
    y = tl.load(at + d[None, :], mask=inside, other=0.0)
    p = tl.load(at + partner(d, ROPE, INTERLEAVED)[None, :], mask=inside, other=0.0)
    c = tl.load(cos + d, mask=d < ROPE, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + d, mask=d < ROPE, other=0.0).to(tl.float32)[None, :]
    # Every thread has read before any writes.
    tl.debug_barrier()
    start_next(PDL, LOADED)
    rotated = (y.to(tl.float32) * c + p.to(tl.float32) * s).to(out.dtype.element_ty)
    tl.store(out + (head * out_head)[:, None] + d[None, :], rotated, mask=inside)


@triton.jit
def append_or_rotate(pid, rotated, cache, q_rope, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, tokens, q_row, q_head,
                     kv_row, cache_row, rope_row, HEADS: tl.constexpr, KV: tl.constexpr, ROPE: tl.constexpr,
                     INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_R: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """The first `tokens` programs do a token's KV each, the others BLOCK_H heads of a token's queries, q_rope [T, HEADS, ROPE]
    → rotated, contiguous. Waits for the kernels in front by itself."""
    groups: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    if pid < tokens:
        append_row(cache, kv, kv_weight, cos, sin, kv_rows, pid.to(tl.int64), eps, latent_scale, kv_row, cache_row, rope_row,
                   KV, ROPE, INTERLEAVED, BLOCK_KV, BLOCK_R, PDL)  # fmt: skip
    else:
        wait_for_inputs(PDL)
        token = ((pid - tokens) // groups).to(tl.int64)
        rotate_heads(rotated + token * (HEADS * ROPE), q_rope + token * q_row, cos + token * rope_row, sin + token * rope_row,
                     (pid - tokens) % groups * BLOCK_H, q_head, ROPE, HEADS, ROPE, INTERLEAVED, BLOCK_H, BLOCK_R,
                     PDL)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _append_and_rotate_kernel(rotated, cache, q_rope, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, tokens, q_row,
                              q_head, kv_row, cache_row, rope_row, HEADS: tl.constexpr, KV: tl.constexpr, ROPE: tl.constexpr,
                              INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
                              BLOCK_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    start_next(PDL, FIRST)
    append_or_rotate(tl.program_id(0), rotated, cache, q_rope, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, tokens,
                     q_row, q_head, kv_row, cache_row, rope_row, HEADS, KV, ROPE, INTERLEAVED, BLOCK_H, BLOCK_KV, BLOCK_R,
                     PDL)  # fmt: skip


def append_and_rotate(
    q_rope: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    cache: Tensor,
    *,
    eps: float,
    latent_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """`append_latents` and `rotate_queries` in one launch: q_rope [T, H, R], any strides but a contiguous last dimension →
    rotated, [T, H, R], contiguous."""
    tokens, heads, rope = q_rope.shape
    size, block_h = kv_weight.shape[0], min(16, power_of_2(heads))
    rotated = q_rope.new_empty(tokens, heads, rope)
    launch(
        _append_and_rotate_kernel, (tokens * (1 + -(-heads // block_h)),), rotated, cache, q_rope, kv, kv_weight, cos, sin,
        kv_rows, eps, latent_scale, tokens, q_rope.stride(0), q_rope.stride(1), kv.stride(0), cache.stride(0), cos.stride(0),
        HEADS=heads, KV=size, ROPE=rope, INTERLEAVED=interleaved, BLOCK_H=block_h, BLOCK_KV=power_of_2(size),
        BLOCK_R=power_of_2(rope), num_warps=4, **programmatic(kv.device),
    )  # fmt: skip
    return rotated


@triton.jit
def _append_latents_kernel(cache, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, kv_row, cache_row, rope_row,
                           KV: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_KV: tl.constexpr,
                           BLOCK_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    start_next(PDL, FIRST)
    append_row(cache, kv, kv_weight, cos, sin, kv_rows, tl.program_id(0).to(tl.int64), eps, latent_scale, kv_row, cache_row,
               rope_row, KV, ROPE, INTERLEAVED, BLOCK_KV, BLOCK_R, PDL)  # fmt: skip


def append_latents(
    kv: Tensor,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    cache: Tensor,
    *,
    eps: float,
    latent_scale: float = 1.0,
    interleaved: bool = False,
) -> None:
    """kv [T, C + R] (KV latent, rotary key; rows at any distance), kv_weight [C], cos and sin [T, 1, R].

    The normed KV latent, times `latent_scale`, and the rotated key go to rows kv_rows [T] int64 of cache [rows, C + R].
    Reference: `PlainOps.rms_norm`, `PlainOps.rotary`, `Tensor.index_copy_`.
    """
    size, rope = kv_weight.shape[0], cos.shape[-1]
    launch(
        _append_latents_kernel, (kv.shape[0],), cache, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, kv.stride(0),
        cache.stride(0), cos.stride(0), KV=size, ROPE=rope, INTERLEAVED=interleaved, BLOCK_KV=power_of_2(size),
        BLOCK_R=power_of_2(rope), num_warps=4, **programmatic(kv.device),
    )  # fmt: skip


@triton.jit
def _rotate_queries_kernel(out, x, cos, sin, x_row, x_head, out_row, out_head, rope_row, HEADS: tl.constexpr,
                           ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
                           PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    rotate_heads(out + token * out_row, x + token * x_row, cos + token * rope_row, sin + token * rope_row,
                 tl.program_id(1) * BLOCK_H, x_head, out_head, HEADS, ROPE, INTERLEAVED, BLOCK_H, BLOCK_R, PDL)  # fmt: skip


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
