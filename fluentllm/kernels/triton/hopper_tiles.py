"""Which tile a product of few rows takes on Hopper (`linear_hopper`): by a rule, nearly as good as what was measured best.

A program's weights are on their way before its input is there, so there should be many programs; those of the whole matrix
should all run at once; and what several found of one tile has to be added up, which takes longer the more rows there are. So
small matrices are not cut, and large ones into even parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from triton import knobs
from triton.experimental.gluon import language as gl

from ..fp8_weight import on_hopper
from .launch import multiprocessors, power_of_2

if TYPE_CHECKING:
    import torch

ROWS: gl.constexpr = gl.constexpr(64)
"""Of a tile: a matrix instruction's."""
BYTES: gl.constexpr = gl.constexpr(128)
"""Columns are taken by as many as TMA swizzles; in E4M3 they share a scale."""
MOST_TOKENS = {1: 64, 2: 16}
"""By bytes of an element: more are `linear`'s own kernel's, or the library's. At 32 tokens in BF16 it is 10 % slower to 14 %
faster than that, by shape."""
SHARED_BYTES = 113 * 1024 - 512
"""Of a program: two fit, this one and one of the next product."""
SCALE_BYTES = 16 * 1024
"""Of a program's scales."""
LEAST_BYTES = {8: 64, 16: 64, 32: 80, 64: 96}
"""KiB of weights of a program, by a tile's tokens: what a tile's programs have to hand on grows with these."""


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Sizes of `hopper_product`."""

    tokens: int
    """8, 16, 32 or 64: rows of x, padded."""
    unit: int
    """Of 128 bytes of each row, in a stage."""
    splits: int = 1
    """Programs that share a tile's depth; or"""
    together: int = 1
    """tiles of a program."""

    @property
    def rows(self) -> int:
        """Of the matrix, in a tile."""
        return ROWS.value


@cache
def hopper_tile(tokens: int, rows: int, depth: int, width: int, gated: bool, device: torch.device) -> HopperTile | None:
    """For x [tokens, depth] and a matrix [rows, depth] (twice the rows if gated) of `width` bytes an element; None where this
    kernel does not run, or not for so many."""
    runs = not knobs.runtime.interpret and (device.type == "meta" or on_hopper(device))
    return rule(tokens, rows, depth, width, gated, multiprocessors(device)) if runs else None


def rule(tokens: int, rows: int, depth: int, width: int, gated: bool, processors: int) -> HopperTile | None:
    """The same for so many multiprocessors: programs of 64 KB and more that all run at once, whole tiles where they are small.
    Within 2 % of the best of benchmarks/kernels/gemm.py on average, and within 11 % everywhere."""
    if not 0 < tokens <= MOST_TOKENS.get(width, 0):
        return None
    wide = max(8, power_of_2(tokens))
    unit = 4 if wide <= (32 if width == 1 else 8) else 2
    if gated:
        unit = 1 if wide == 64 else 2
    halves = 2 if gated else 1
    tiles, blocks = -(-rows // ROWS.value), -(-depth * width // BYTES.value)
    units, places = -(-blocks // unit), 2 * processors
    whole, least = 8 * blocks * halves, LEAST_BYTES[wide] * halves * (2 if gated and wide >= 32 else 1)
    many = tiles >= places // 6
    splits = 1
    if tiles <= places and not (many and whole <= 128):
        most = max(1, min(places // tiles, 8, round(whole / least - 0.2)))
        most = most if many else max(most, -(-64 // tiles))
        splits = max(n for n in range(1, most + 1) if units % n == 0)
        if tiles * splits < places // 6:
            splits = -(-units // -(-units // most))
    tile = HopperTile(wide, unit, splits, -(-tiles // places))
    return tile if fits(tile, depth, width, gated) else None


def fits(tile: HopperTile, depth: int, width: int, gated: bool) -> bool:
    """Have a program's scales and a ring of two stages room, for columns of `width` bytes?"""
    units = -(-depth * width // (BYTES.value * tile.unit))
    return stages_of(tile, units, 2 if gated else 1, width) >= min(2, -(-units // tile.splits))


def stages_of(tile: HopperTile, units: int, halves: int, width: int) -> int:
    """Of the ring; 0: the scales leave no room."""
    span = -(-units // tile.splits)
    scales = 4 * halves * tile.tokens * power_of_2(tile.together * span * tile.unit) if width == 1 else 0
    if scales > SCALE_BYTES:
        return 0
    stage = tile.unit * BYTES.value * (ROWS.value * halves + tile.tokens)
    # What remains beside the scales, and a tile of sums that changes its layout.
    return min(tile.together * span, (SHARED_BYTES - scales - 4 * ROWS.value * tile.tokens) // stage)
