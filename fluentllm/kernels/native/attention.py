"""Decode attention over paged keys and values in C: one call a layer appends the new rows and attends."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from .library import DecodeShape

if TYPE_CHECKING:
    from torch import Tensor

    from .library import Library


class PagedDecode:
    """For float32 queries, keys and values whose heads are all of one size."""

    def __init__(self, library: Library) -> None:
        self._attend = library.decode_attention
        self._shape = DecodeShape()
        self._key: tuple[object, ...] = ()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pools: tuple[Tensor, Tensor],
        kv_rows: Tensor,
        page_table: Tensor,
        positions: Tensor,
        scale: float,
        first_key: int = 0,
    ) -> Tensor:
        """q [N · j, H, D], k and v [N · j, Hkv, D], any distance from row to row; pools [pages, page_size, Hkv, D], to whose
        rows `kv_rows` [N · j] int64 k and v are written first; page_table [N, P] int32; row t sees the positions
        first_key … positions[t] of its sequence, and gets something finite where there are none → [N · j, H, D]."""
        rows, heads, size = q.shape
        out = torch.empty(rows, heads, size)
        if not rows:
            return out
        page_table = page_table.contiguous()
        strides, page_size = (q.stride(0), k.stride(0), v.stride(0)), pools[0].shape[1]
        key = (rows, heads, size, k.shape[1], strides, page_table.shape, page_size, scale, first_key)
        if key != self._key:
            self._key = key
            self._shape = _shape(q, k, v, page_size, page_table, scale, first_key)
        failed = self._attend(
            ctypes.addressof(self._shape),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            pools[0].data_ptr(),
            pools[1].data_ptr(),
            kv_rows.data_ptr(),
            page_table.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError("No memory for the scores of attention.")
        return out


def _shape(q: Tensor, k: Tensor, v: Tensor, page_size: int, page_table: Tensor, scale: float, first_key: int) -> DecodeShape:
    rows, heads, size = q.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1 or tensor.stride(1) != size:
            raise ValueError(f"the heads of {name} do not lie side by side: strides {tensor.stride()}")
    sequences = page_table.shape[0]
    return DecodeShape(
        sequences=sequences,
        queries=rows // sequences,
        heads=heads,
        kv_heads=k.shape[1],
        size=size,
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        page_size=page_size,
        page_stride=page_table.shape[1],
        first_key=first_key,
        scale=scale,
    )
