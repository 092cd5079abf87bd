"""Which rows of the n-gram tables a token reads: hashes of the token and of those before it, from the slots' token history.

Runs inside the step program, so no value leaves the device. Formula: models with `ngram_vocab_size_ratio` in their config
(LongCat-Flash-Lite, arXiv:2601.21204).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NgramHash:
    """N-grams of n = 2 … neighbors tokens, each hashed `splits` times: table (n - 2) · splits + k belongs to hash k of n."""

    vocab: int
    ratio: float
    neighbors: int
    splits: int
    stops: tuple[int, ...]
    """End-of-sequence ids: looking back stops in front of one."""

    @property
    def tables(self) -> int:
        return (self.neighbors - 1) * self.splits

    def rows(self, table: int) -> int:
        """Modulus of a table's hash, which is its number of rows."""
        return int(self.ratio * self.vocab) + 2 * table + 1

    def moduli(self) -> Tensor:
        """[tables] int64."""
        return torch.tensor([self.rows(table) for table in range(self.tables)], dtype=torch.int64)

    def factors(self) -> Tensor:
        """[neighbors, tables] int64: what the token δ places back is multiplied with, vocab^δ mod rows; 0 where the n-gram
        is shorter."""
        return torch.tensor(
            [
                [pow(self.vocab, back, self.rows(i)) if back < 2 + i // self.splits else 0 for i in range(self.tables)]
                for back in range(self.neighbors)
            ],
            dtype=torch.int64,
        )


@dataclass(slots=True)
class NgramTables:
    """The tables of one embedding, one below the other, and what their hashes need. All but `rows` on the model's device."""

    rows: Tensor
    """[Σ rows, width], on the device or in host memory, pinned where there is a GPU."""
    starts: Tensor
    """[tables] int64, first row of each table."""
    factors: Tensor
    """[neighbors, tables] int64."""
    moduli: Tensor
    """[tables] int64."""
    stops: Tensor
    """[E] int64."""


def ngram_ids(
    tokens: Tensor, positions: Tensor, slots: Tensor, history: Tensor, stops: Tensor, factors: Tensor, moduli: Tensor
) -> Tensor:
    """Rows to read, [T, tables] int64.

    tokens, positions, slots [T] int64 (slots: each row's line in the history), history [S, L] integers, stops [E] int64,
    factors [neighbors, tables] and moduli [tables] as `NgramHash` gives them.
    """
    total = tokens.unsqueeze(1) * factors[0]
    open_ = torch.ones_like(tokens, dtype=torch.bool)
    last = history.shape[1] - 1
    for back in range(1, factors.shape[0]):
        before = positions - back
        token = history[slots, before.clamp(0, last)].long()
        open_ = open_ & (before >= 0) & (token.unsqueeze(1) != stops).all(1)
        total += torch.where(open_, token, 0).unsqueeze(1) * factors[back]
    return total % moduli
