"""The QKV product as decode takes it, without a launch in between: how `gqa_decode` norms, rotates and appends by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .launch import power_of_2, split_width
from .rotate import kept

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class QkvProduct:
    """What `gqa_decode` makes queries, keys and values of."""

    qkv: Tensor
    """[T, (H + 2 Hkv) · D], last dimension contiguous."""
    cos: Tensor
    """[T, 1, R] of each row's position, R ≤ D, as `Ops.rotary` wants it. Like `sin` and `kv_rows` made before the first layer,
    by launches that let nobody start before they have ended: it is read before the kernels in front have finished."""
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
def write_new(k, v, k_at, v_at, target, mask, d, k_page, k_slot, v_page, v_slot, PAGE: tl.constexpr):
    """New tokens' keys and values [NEW, BLOCK_D] of one head → their rows `target` [NEW] of the cache, and what it keeps of
    them. They are there for what this program reads next."""
    page, slot = target // PAGE, target % PAGE
    k = kept(k.to(tl.float32), k_at.dtype.element_ty)
    v = kept(v.to(tl.float32), v_at.dtype.element_ty)
    tl.store(k_at + (page * k_page + slot * k_slot)[:, None] + d[None, :], k, mask=mask)
    tl.store(v_at + (page * v_page + slot * v_slot)[:, None] + d[None, :], v, mask=mask)
    tl.debug_barrier()
    return k, v


@triton.jit
def with_new(held, new, key, position0, ROWS: tl.constexpr, NEW: tl.constexpr):
    """held [N, D], of keys `key` [N], with the new tokens' rows [NEW, D] at their positions, from position0 on."""
    j = tl.arange(0, NEW)
    for i in tl.static_range(ROWS):
        row = tl.sum(tl.where((j == i)[:, None], new.to(tl.float32), 0.0), 0).to(held.dtype)
        held = tl.where((key == position0 + i)[:, None], row[None, :], held)
    return held
