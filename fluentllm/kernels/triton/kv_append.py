"""Between the QKV product and attention, in one launch: norm of queries and keys, rotary, KV into the pool.

Two launchers: `rotate_and_append` takes the product as it comes; `append` only writes rows that are ready (any cache of rows).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .rotate import head_weight, kept, norm_and_rotate, partner

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _rotate_and_append_kernel(
    q_out, k_rows, v_rows, qkv, cos, sin, kv_row, q_weight, k_weight, positions, eps, inverse_k_scale, inverse_v_scale,
    qkv_row, q_row, k_row, k_head, v_row, v_head, rope_row,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    inside = (d < DIM)[None, :]
    present = (is_q | is_k | is_v)[:, None] & inside
    base = qkv + token * qkv_row + (head * DIM)[:, None]
    at = token
    if positions is not None:
        at = tl.load(positions + token).to(tl.int64)
    rope = (head * 0 + at)[:, None] * rope_row
    if q_weight is None:
        rotated, x = norm_and_rotate(base, present, None, None, cos + rope, sin + rope, d, eps, DIM, ROTARY, INTERLEAVED)
    else:
        partner_d = partner(d, ROTARY, INTERLEAVED)
        weight = tl.where(is_q[:, None], head_weight(q_weight, d, DIM), head_weight(k_weight, d, DIM))
        other = tl.where(is_q[:, None], head_weight(q_weight, partner_d, DIM), head_weight(k_weight, partner_d, DIM))
        rotated, x = norm_and_rotate(base, present, weight, other, cos + rope, sin + rope, d, eps, DIM, ROTARY, INTERLEAVED)
    start_next(PDL, LOADED)

    tl.store(q_out + token * q_row + (head * DIM)[:, None] + d[None, :], rotated, mask=is_q[:, None] & inside)
    row = tl.load(kv_row + token).to(tl.int64)
    k = kept(rotated.to(tl.float32) * inverse_k_scale, k_rows.dtype.element_ty)
    v = kept(x.to(tl.float32) * inverse_v_scale, v_rows.dtype.element_ty)
    k_at = k_rows + row * k_row + ((head - HEADS) * k_head)[:, None] + d[None, :]
    v_at = v_rows + row * v_row + ((head - HEADS - KV_HEADS) * v_head)[:, None] + d[None, :]
    tl.store(k_at, k, mask=is_k[:, None] & inside)
    tl.store(v_at, v, mask=is_v[:, None] & inside)


def rotate_and_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    heads: int,
    *,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """qkv [T, (H + 2 Hkv) · D], the product's output → queries [T, H, D], normed and rotated; keys (the same) and values go to
    rows `kv_rows` [T] int64 of k_rows and v_rows [rows, Hkv, D], divided by the scales of an FP8 cache.

    cos, sin: a row a token [T, 1, R], or, with `positions` [T] int64, the tables of all positions [L, 1, R]; R ≤ D.
    q_weight, k_weight [D]: both or none. Reference: `PlainOps.rms_norm`, `PlainOps.rotary`, `Tensor.index_copy_`.
    """
    tokens = qkv.shape[0]
    _, kv_heads, dim = k_rows.shape
    q = qkv.new_empty(tokens, heads, dim)
    rope_row = cos.stride(0)
    block_d = power_of_2(dim)
    total = heads + 2 * kv_heads
    block_h = max(1, min(8, 1024 // block_d, power_of_2(total)))
    launch(
        _rotate_and_append_kernel, (tokens, -(-total // block_h)), q, k_rows, v_rows, qkv, cos, sin, kv_rows,
        q_weight, k_weight, positions, eps, 1 / k_scale, 1 / v_scale,
        qkv.stride(0), q.stride(0), k_rows.stride(0), k_rows.stride(1), v_rows.stride(0), v_rows.stride(1), rope_row,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, ROTARY=cos.shape[-1], INTERLEAVED=interleaved,
        BLOCK_D=block_d, BLOCK_H=block_h, num_warps=4, **programmatic(qkv.device),
    )  # fmt: skip
    return q


@triton.jit
def _append_kernel(first_out, second_out, first, second, rows, first_row, second_row, first_out_row, second_out_row,
                   inverse_first_scale, inverse_second_scale, FIRST_SIZE: tl.constexpr, SECOND_SIZE: tl.constexpr,
                   BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + token).to(tl.int64)
    a = tl.load(first + token * first_row + i, mask=i < FIRST_SIZE, other=0.0)
    b = tl.load(second + token * second_row + i, mask=i < SECOND_SIZE, other=0.0)
    start_next(PDL, LOADED)
    a = kept(a.to(tl.float32) * inverse_first_scale, first_out.dtype.element_ty)
    b = kept(b.to(tl.float32) * inverse_second_scale, second_out.dtype.element_ty)
    tl.store(first_out + row * first_out_row + i, a, mask=i < FIRST_SIZE)
    tl.store(second_out + row * second_out_row + i, b, mask=i < SECOND_SIZE)


def append(
    first: Tensor,
    second: Tensor,
    rows: Tensor,
    first_out: Tensor,
    second_out: Tensor,
    *,
    first_scale: float = 1.0,
    second_scale: float = 1.0,
) -> None:
    """first [T, A] and second [T, B] to rows `rows` [T] int64 of first_out [R, A] and second_out [R, B] (which may be two
    parts of one cache), divided by the scales; last dimensions contiguous. Reference: `Tensor.index_copy_`."""
    block = min(1024, power_of_2(max(first.shape[1], second.shape[1])))
    blocks = -(-max(first.shape[1], second.shape[1]) // block)
    launch(
        _append_kernel, (rows.shape[0], blocks), first_out, second_out, first, second, rows,
        first.stride(0), second.stride(0), first_out.stride(0), second_out.stride(0), 1 / first_scale, 1 / second_scale,
        FIRST_SIZE=first.shape[1], SECOND_SIZE=second.shape[1], BLOCK=block, num_warps=4, **programmatic(first.device),
    )  # fmt: skip


def flat_heads(x: Tensor) -> Tensor:
    """x [T, H, D] as [T, H · D], a copy only where its heads do not lie side by side."""
    if x.stride(1) == x.shape[2] and x.stride(2) == 1:
        return torch.as_strided(x, (x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1), x.storage_offset())
    return x.flatten(1)
