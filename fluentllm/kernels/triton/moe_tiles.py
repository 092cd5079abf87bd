"""Which tiles the experts' grouped products take: a rule, from what was best of many layers and numbers of tokens in
benchmarks/kernels/grouped_gemm.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of a grouped product."""

    rows: int
    """Pairs of a tile, a power of two: at least 16, swapped at least 8."""
    columns: int
    """Rows of `down`; half as many of gate and of up."""
    depth: int
    """Columns of the matrices a step; 128 with block scales."""
    warps: int
    stages: int
    swapped: bool = False
    """`moe_stream` (matrix rows are the M of the instruction), else `moe_grouped` (pairs are)."""
    tma: bool = True
    """`moe_stream`: copy the matrices by TMA."""


def tile_for(pairs: int, experts: int, width: int = 2) -> Tile:
    """By the pairs that an expert gets on average, for matrices of `width` bytes an element. Few: the product reads matrices,
    so tiles are thin and many loads fly."""
    each = pairs / experts
    if width == 1:
        rows = 8 if each <= 2 else 16 if each <= 12 else 32 if each <= 32 else 64 if each <= 64 else 128
        return Tile(rows, 128, 128, 8 if rows == 128 else 4, 3 if rows == 128 else 5, swapped=True)
    if each <= 16:
        return Tile(16, 64, 128, 4, 4)
    if each <= 48:
        return Tile(64, 64, 128, 4, 3)
    if width == 2:
        # H100, BF16, 500 to 800 pairs an expert: 20 to 30 % less time than 128 × 128.
        return Tile(128, 256, 64, 8, 4, swapped=True)
    return Tile(128, 128, 64, 8, 3)
