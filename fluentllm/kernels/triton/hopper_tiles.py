"""Which tile a product of few rows takes on Hopper: by a rule, nearly as good as what was measured best.

A program's weights are on their way before its input is there, so there should be many programs; those of the whole matrix
should all run at once; and what several found of one tile has to be added up, which takes longer the more rows there are. So
tiles of shallow matrices and of ones with many rows are not cut (`linear_hopper`); others are shared by the programs of a
cluster (`cuda.linear_cluster`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from triton import knobs
from triton.experimental.gluon import language as gl

from ..cuda.compile import compiler_version
from ..cuda.linear_cluster import ClusterTile
from ..fp8_weight import on_hopper
from .launch import multiprocessors, power_of_2

if TYPE_CHECKING:
    import torch

ROWS: gl.constexpr = gl.constexpr(64)
"""Of a tile: a matrix instruction's."""
BYTES: gl.constexpr = gl.constexpr(128)
"""Columns are taken by as many as TMA swizzles; in E4M3 they share a scale."""
MOST_TOKENS = {1: 64, 2: 16}
"""By bytes of an element: more are `linear`'s own kernel's, or the library's."""
MOST_SHARED_TOKENS = {1: 64, 2: 32}
"""The same where a cluster's programs share a tile."""
WHOLE_KIB = 128
"""Tiles up to this are not cut where there are many."""
LEAST_STEPS = {8: 4, 16: 4, 32: 8, 64: 8}
"""Of 128 bytes, of a program that shares a tile, by its tokens: what they have to hand on grows with these."""
SHARED_BYTES = 113 * 1024 - 512
"""Of a program: two fit, this one and one of the next product."""
SCALE_BYTES = 16 * 1024
"""Of a program's scales."""


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Sizes of `hopper_product`."""

    tokens: int
    """8, 16, 32 or 64: rows of x, padded."""
    unit: int
    """Of 128 bytes of each row, in a stage."""
    together: int = 1
    """Tiles of a program."""

    @property
    def rows(self) -> int:
        """Of the matrix, in a tile."""
        return ROWS.value


@cache
def hopper_tile(
    tokens: int, rows: int, depth: int, width: int, gated: bool, device: torch.device
) -> HopperTile | ClusterTile | None:
    """For x [tokens, depth] and a matrix [rows, depth] (twice the rows if gated) of `width` bytes an element; None where
    neither kernel runs, or not for so many."""
    if knobs.runtime.interpret or not (device.type == "meta" or on_hopper(device)):
        return None
    tile = rule(tokens, rows, depth, width, gated, multiprocessors(device))
    return None if isinstance(tile, ClusterTile) and compiler_version() is None else tile


def rule(
    tokens: int, rows: int, depth: int, width: int, gated: bool, processors: int
) -> HopperTile | ClusterTile | None:  # fmt: skip
    """The same for so many multiprocessors."""
    wide = max(8, power_of_2(tokens))
    tiles, blocks = -(-rows // ROWS.value), -(-depth * width // BYTES.value)
    if 0 < tokens <= MOST_SHARED_TOKENS.get(width, 0):
        splits = _splits(tiles, blocks, wide, gated, processors)
        if splits > 1:
            shared = ClusterTile(wide, splits)
            return shared if shared.fits(tokens, depth, width, gated) else None
    if not 0 < tokens <= MOST_TOKENS.get(width, 0):
        return None
    unit = 4 if wide <= (32 if width == 1 else 8) else 2
    if gated:
        unit = 1 if wide == 64 else 2
    whole = HopperTile(wide, unit, -(-tiles // (2 * processors)))
    return whole if fits(whole, depth, width, gated) else None


def _splits(tiles: int, blocks: int, wide: int, gated: bool, processors: int) -> int:
    """Programs that share a tile. Three programs on every two multiprocessors were best, or nearly, for most shapes."""
    many = tiles >= processors // 3
    if (many and 8 * blocks * (2 if gated else 1) <= WHOLE_KIB) or (gated and wide > 16):
        return 1
    return max(1, min(8, 3 * processors // 2 // tiles, blocks // LEAST_STEPS[wide]))


def fits(tile: HopperTile, depth: int, width: int, gated: bool) -> bool:
    """Have a program's scales and a ring of two stages room, for columns of `width` bytes?"""
    units = -(-depth * width // (BYTES.value * tile.unit))
    return stages_of(tile, units, 2 if gated else 1, width) >= min(2, units)


def stages_of(tile: HopperTile, units: int, halves: int, width: int) -> int:
    """Of the ring; 0: the scales leave no room."""
    scales = 4 * halves * tile.tokens * power_of_2(tile.together * units * tile.unit) if width == 1 else 0
    if scales > SCALE_BYTES:
        return 0
    stage = tile.unit * BYTES.value * (ROWS.value * halves + tile.tokens)
    # What remains beside the scales, and a tile of sums that changes its layout.
    return min(tile.together * units, (SHARED_BYTES - scales - 4 * ROWS.value * tile.tokens) // stage)
