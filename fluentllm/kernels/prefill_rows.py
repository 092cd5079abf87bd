"""The rows of a prefill pass in tensors that stay where they are, so that launches which read them can be repeated as a graph.

What the host uploads is a column a chunk; `triton.prefill_rows` makes rows of that in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SLOT, START, FIRST_ROW, KEYS = range(4)
"""Lines of `PrefillRows.given`."""


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """N sequences at most, R rows at most; the tensors that a pass is made in."""

    given: Tensor
    """[4, N] int64, a column a sequence: slot, position of its first row, its first row, keys after the pass. A sequence's rows
    end where the next one's begin. The one behind the chunks' own stands for the rows that are padding, and has no keys; those
    behind it begin behind all rows, and have none."""
    tokens: Tensor
    """[R] int64; of padding, whatever its slot's history begins with."""
    positions: Tensor
    """[R] int64; of padding, 0."""
    sequences: Tensor
    """[R] int64."""
    kv_rows: Tensor
    """[R] int64; of padding, 0: the scratch page."""
    query_start: Tensor
    """[N + 1] int32."""
    kv_lengths: Tensor
    """[N] int32."""

    @classmethod
    def create(cls, sequences: int, rows: int, device: torch.device) -> PrefillRows:
        longs = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4)]
        ints = [torch.zeros(n, dtype=torch.int32, device=device) for n in (sequences + 1, sequences)]
        return cls(torch.zeros(4, sequences, dtype=torch.int64, device=device), *longs, *ints)


def prefill_rows_reference(
    into: PrefillRows, real: int, rows: int, history: Tensor, page_table: Tensor, page_size: int
) -> None:
    """The same by torch."""
    slots, starts, firsts, keys = into.given
    row = torch.arange(rows, device=firsts.device)
    sequences = torch.searchsorted(firsts.contiguous(), row, right=True) - 1
    own = row < real
    positions = torch.where(own, starts[sequences] + row - firsts[sequences], 0)
    pages = page_table[slots[sequences], positions // page_size].to(torch.int64)
    into.tokens[:rows] = history[slots[sequences], positions].to(torch.int64)
    into.positions[:rows] = positions
    into.sequences[:rows] = sequences
    into.kv_rows[:rows] = torch.where(own, pages * page_size + positions % page_size, 0)
    into.query_start[:-1] = firsts.clamp(max=rows).to(torch.int32)
    into.query_start[-1] = rows
    into.kv_lengths.copy_(keys)
