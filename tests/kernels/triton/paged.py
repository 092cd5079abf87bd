"""Random paged KV for the tests: sequences of given lengths with their pages scattered over a pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Paged:
    k: Tensor
    """[pages + 1, page_size, Hkv, D]"""
    v: Tensor
    table: Tensor
    """[N, P] int32"""
    lengths: Tensor
    """[N] int32"""

    def keys(self, sequence: int) -> tuple[Tensor, Tensor]:
        """The sequence's keys and values in float64, [length, Hkv, D]."""
        length = int(self.lengths[sequence])
        pages = self.table[sequence].long()
        return tuple(t[pages].flatten(0, 1)[:length].double() for t in (self.k, self.v))  # type: ignore[return-value]

    def kv_row(self, sequence: int, position: int) -> int:
        page_size = self.k.shape[1]
        return int(self.table[sequence, position // page_size]) * page_size + position % page_size


def random_paged(
    lengths: list[int],
    rng: torch.Generator,
    device: torch.device,
    *,
    kv_heads: int,
    dim: int,
    value_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Paged:
    width = max(1, -(-max(lengths, default=1) // page_size)) + 1
    pages = len(lengths) * width
    order = torch.randperm(pages, generator=rng) + 1
    shape = (pages + 1, page_size, kv_heads)
    k = torch.randn(*shape, dim, generator=rng)
    v = torch.randn(*shape, value_dim or dim, generator=rng)
    return Paged(
        k.to(device, dtype),
        v.to(device, dtype),
        order.view(len(lengths), width).to(device, torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )
