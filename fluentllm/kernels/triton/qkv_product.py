"""The QKV product as decode takes it, without a launch in between: how `gqa_decode` norms, rotates and appends by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .launch import power_of_2, split_width
from .rotate import head_weight, kept, norm_and_rotate, partner

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class QkvProduct:
    """What `gqa_decode` makes queries, keys and values of."""

    qkv: Tensor
    """[T, (H + 2 Hkv) · D], last dimension contiguous."""
    cos: Tensor
    """[T, 1, R] of each row's position, R ≤ D, as `Ops.rotary` wants it."""
    sin: Tensor
    kv_rows: Tensor
    """[T] int64: each row's place in the cache, page · page size + slot. Rows that nobody reads may share one."""
    heads: int
    q_weight: Tensor | None = None
    """[D]: norms of queries and keys, both or none."""
    k_weight: Tensor | None = None
    eps: float = 0.0
    interleaved: bool = False


def from_product_fits(dim: int, value_dim: int) -> bool:
    """Does `gqa_decode` take a `QkvProduct` of such heads? They must be one tile wide."""
    return dim == value_dim and split_width(dim)[1] == 0


@dataclass(frozen=True, slots=True)
class Opened:
    """Queries as the kernel takes them."""

    tensor: Tensor
    """[T, H, D], or the product."""
    heads: int
    head_stride: int
    operands: tuple[Any, ...]
    """cos, sin, q_weight, k_weight, kv_rows, eps, rope_row."""
    options: dict[str, Any]


def opened(q: Tensor | QkvProduct, rows: int, dim: int, value_dim: int) -> Opened:
    """Queries [T, H, D] that are ready, or what they are to be made of, `rows` a sequence."""
    if isinstance(q, torch.Tensor):
        return Opened(q, q.shape[1], q.stride(1), (None,) * 5 + (0.0, 0), {"NEW": 0, "ROTARY": 0, "INTERLEAVED": False})
    if not from_product_fits(dim, value_dim):
        raise ValueError(f"keys of {dim} and values of {value_dim} must be appended first")
    operands = q.cos, q.sin, q.q_weight, q.k_weight, q.kv_rows, q.eps, q.cos.stride(0)
    options = {"NEW": power_of_2(rows), "ROTARY": q.cos.shape[-1], "INTERLEAVED": q.interleaved}
    return Opened(q.qkv, q.heads, dim, operands, options)


@triton.jit
def append_keys(k_new, to_v, k_at, v_at, kv_rows, cos, sin, weight, token0, position0, first, last, d, eps, row, rope_row,
                k_page, k_slot, v_page, v_slot, ROWS: tl.constexpr, NEW: tl.constexpr, DIM: tl.constexpr,
                ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Of a sequence's ROWS new tokens (rows from `token0`, positions from `position0` on) those that lie in the run [first,
    last): one head's keys, normed and rotated, and values go to the cache, and are there for what this program reads next."""
    if last > position0:
        j = tl.arange(0, NEW)
        mine = (j < ROWS) & (position0 + j >= first) & (position0 + j < last)
        token = (token0 + j).to(tl.int64)
        mask = mine[:, None] & (d < DIM)[None, :]
        at = k_new + (token * row)[:, None]
        rope = (token * rope_row)[:, None]
        other = partner(d, ROTARY, INTERLEAVED)
        k, _ = norm_and_rotate(at, mask, head_weight(weight, d, DIM), head_weight(weight, other, DIM), cos + rope, sin + rope,
                               d, eps, DIM, ROTARY, INTERLEAVED)  # fmt: skip
        v = tl.load(at + to_v + d[None, :], mask=mask, other=0.0)
        target = tl.load(kv_rows + token, mask=mine, other=0).to(tl.int64)
        page, slot = target // PAGE, target % PAGE
        k_to = k_at + (page * k_page + slot * k_slot)[:, None] + d[None, :]
        v_to = v_at + (page * v_page + slot * v_slot)[:, None] + d[None, :]
        tl.store(k_to, kept(k.to(tl.float32), k_at.dtype.element_ty), mask=mask)
        tl.store(v_to, kept(v.to(tl.float32), v_at.dtype.element_ty), mask=mask)
        tl.debug_barrier()
