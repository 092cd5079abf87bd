"""Which rows each program of a prefill's attention computes: tiles, made on the host, where a prefill's lengths are known.

Tiles with the most keys come first, so that none is left over at the end. A short chunk behind a long context has few tiles,
each with a long loop. Where tiles do not fill the chip, a tile holds the rows of all heads that share keys, so that these are
read once; and several programs share the keys of each tile.

A pass that is captured finds its tiles where the one before it had them: `PaddedPlans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .launch import multiprocessors
from .tile_table import tile_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Tile = tuple[int, int, int, int]
    """A column of `PrefillTiles.table`."""

LEAST_RUN = 512
"""Keys of a program that shares a tile: merging costs about as much as reading a few blocks of keys."""
MOST_SPLITS = 64


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Which rows each program computes."""

    table: Tensor
    """[4, tiles] int32: sequence, first token of the tile in the batch, tokens, position of its first token. A tile whose last
    token stands before position 0 sees no keys: its result is 0."""
    pack: int
    """Heads of a tile, which share keys: a token has a row for each."""
    splits: int
    """Programs that share a tile's keys."""


class PrefillPlan:
    """One pass: sequence i has query_lengths[i] tokens, the last of kv_lengths[i] keys. rows: of a tile. splits: 1 for whole
    tiles of one head, more for packed ones; None: what fills the chip."""

    def __init__(
        self,
        query_lengths: Sequence[int],
        kv_lengths: Sequence[int],
        device: torch.device,
        *,
        rows: int = 128,
        splits: int | None = None,
    ) -> None:
        self.rows = rows
        self._lengths = list(zip(query_lengths, kv_lengths, strict=True))
        self._device = device
        self._splits = splits
        self._tiles: dict[tuple[int, int], PrefillTiles] = {}

    def tiles(self, heads: int, kv_heads: int) -> PrefillTiles:
        """For all layers with so many heads; made at the first."""
        key = heads, kv_heads
        if key not in self._tiles:
            tiles, pack, splits = _divide(self._lengths, heads, kv_heads, self.rows, self._splits, self._device)
            self._tiles[key] = PrefillTiles(tile_table(tiles, 4, self._device), pack, splits)
        return self._tiles[key]


@dataclass(frozen=True, slots=True)
class PaddedPlan:
    """Of one pass, for layers with the heads that it was made for: it can stand where a `PrefillPlan` does."""

    rows: int
    made: PrefillTiles

    def tiles(self, heads: int, kv_heads: int) -> PrefillTiles:
        return self.made

    @property
    def key(self) -> tuple[int, int, int]:
        """What the launches of two passes with as many rows may differ in."""
        return self.made.table.shape[1], self.made.pack, self.made.splits


class PaddedPlans:
    """Plans of passes that end in rows of padding, in tensors that stay where they are: one of the same key replaces the one
    before it, in stream order."""

    def __init__(self, heads: int, kv_heads: int, device: torch.device, *, rows: int = 128) -> None:
        self._heads, self._kv_heads, self._rows, self._device = heads, kv_heads, rows, device
        self._tables: dict[int, Tensor] = {}
        """By the number of tiles."""

    def plan(self, query_lengths: Sequence[int], kv_lengths: Sequence[int], rows: int) -> PaddedPlan:
        """Of a pass with `rows` rows, of which those behind the sequences' own are padding, whose result is 0."""
        lengths = list(zip(query_lengths, kv_lengths, strict=True))
        tiles, pack, splits = _divide(lengths, self._heads, self._kv_heads, self._rows, None, self._device)
        splits = 1 << splits.bit_length() - 1  # fewer keys, and still enough programs
        each, own = self._rows // pack, sum(query_lengths)
        for first in range(own, rows, each):
            count = min(each, rows - first)
            tiles.append((0, first, count, -count))
        # Each sequence may end in a tile that is not full. Few sizes: each is a program of its own. What is spare ends at once,
        # but where many programs share a tile.
        spare = 64 if splits == 1 else 4
        while -(-rows // each) + spare < len(tiles):
            spare *= 4
        size = -(-rows // each) + spare
        tiles += [(0, 0, 0, 0)] * (size - len(tiles))
        if size not in self._tables:
            self._tables[size] = torch.zeros(4, size, dtype=torch.int32, device=self._device)
        self._tables[size].copy_(tile_table(tiles, 4, self._device))
        return PaddedPlan(self._rows, PrefillTiles(self._tables[size], pack, splits))


def _divide(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, rows: int, splits: int | None, device: torch.device
) -> tuple[list[Tile], int, int]:
    """Tiles, heads of each, programs that share one."""
    group, pack = heads // kv_heads, 1
    tiles = _tiles(lengths, rows)
    longest = max((first + count for _, _, count, first in tiles), default=0)
    fill = multiprocessors(device)
    if splits is None and (heads * len(tiles) >= fill or longest < 2 * LEAST_RUN):
        splits = 1
    if splits != 1 and group <= rows:
        pack = group
        tiles = _tiles(lengths, rows // pack)
    if splits is None:
        programs = heads // pack * max(1, len(tiles))
        splits = max(1, min(2 * fill // programs, longest // LEAST_RUN, MOST_SPLITS))
    tiles.sort(key=lambda tile: tile[2] + tile[3], reverse=True)
    return tiles, pack, splits


def _tiles(lengths: list[tuple[int, int]], each: int) -> list[Tile]:
    """Of `each` tokens at most."""
    tiles = []
    start = 0
    for sequence, (count, keys) in enumerate(lengths):
        for first in range(0, count, each):
            tiles.append((sequence, start + first, min(each, count - first), keys - count + first))
        start += count
    return tiles
