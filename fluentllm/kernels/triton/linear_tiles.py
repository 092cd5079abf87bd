"""Which tile a product of few rows takes: measured ones by shape, a rule for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cuda.linear_cluster import ClusterTile
from .held import HeldTile, held_tile
from .hopper_tiles import HopperTile, hopper_tile
from .launch import HOPPER_MULTIPROCESSORS, power_of_2

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Sizes of `linear.linear`."""

    tokens: int
    """Rows of x of a tile, a power of two, at least 8."""
    rows: int
    """Rows of the matrix of a tile (twice as many when gated): 16 and 32 run on mma.sync, 64 and 128 on WGMMA."""
    depth: int
    """Columns a step; 128 with block scales."""
    splits: int
    """Programs that share a tile's columns."""
    stages: int
    warps: int = 4
    tma: bool = True
    prefetch: int = 0
    """Pieces of 256 bytes of each row that are asked for before the kernels before have finished; a power of two or 0."""


Tile = LinearTile | HeldTile | HopperTile | ClusterTile

MOST_TOKENS = 32
"""More rows are the library's."""
MOST_FP8_TOKENS = 64
"""More rows are cuBLAS's (`fp8_library`), or `fp8_gemm`'s. Of 64 rows ours takes 12.4 µs for 4,096 × 4,096 and 11.8 for 2,112 ×
6,144, cuBLAS 14.9 and 19.7 (one H200); of 128, `fp8_gemm` 18.9 and 25.0, cuBLAS 15.3 and 19.9."""

MEASURED: dict[tuple[int, int, int, bool], dict[int, LinearTile]] = {
    (4096, 1024, 2, False): {
        8: LinearTile(8, 64, 128, 1, 5, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
        64: LinearTile(64, 64, 64, 1, 6, 4),
        128: LinearTile(64, 64, 64, 1, 6, 4),
    },
    (1024, 2048, 2, False): {
        8: LinearTile(8, 32, 128, 8, 8, 4),
        32: LinearTile(32, 32, 128, 8, 6, 4),
        64: LinearTile(64, 32, 256, 4, 4, 4),
        128: LinearTile(64, 64, 128, 4, 3, 4),
    },
    (3072, 1024, 2, True): {
        8: LinearTile(8, 32, 256, 1, 5, 4),
        32: LinearTile(32, 64, 128, 1, 5, 4),
        64: LinearTile(64, 64, 128, 1, 4, 4),
        128: LinearTile(64, 64, 128, 1, 4, 4),
    },
    (1024, 3072, 2, False): {
        8: LinearTile(8, 32, 128, 8, 8, 4),
        32: LinearTile(32, 32, 128, 8, 6, 4),
        64: LinearTile(64, 32, 256, 4, 4, 4),
        128: LinearTile(64, 64, 128, 4, 3, 4),
    },
    (151936, 1024, 2, False): {
        8: LinearTile(8, 32, 128, 1, 8, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
        64: LinearTile(64, 64, 128, 1, 3, 4),
        128: LinearTile(128, 64, 64, 1, 4, 4),
    },
    (6144, 4096, 2, False): {
        8: LinearTile(8, 32, 256, 1, 4, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
    },
    (4096, 4096, 2, False): {
        8: LinearTile(8, 64, 128, 1, 5, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
    },
    (14336, 4096, 2, True): {
        8: LinearTile(8, 64, 128, 1, 3, 4),
        32: LinearTile(32, 128, 64, 1, 3, 8),
    },
    (4096, 14336, 2, False): {
        8: LinearTile(8, 64, 128, 2, 5, 4),
        32: LinearTile(32, 64, 128, 4, 4, 4),
    },
    (128256, 4096, 2, False): {
        8: LinearTile(8, 32, 256, 1, 4, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
    },
    (2112, 2048, 2, False): {
        8: LinearTile(8, 64, 64, 4, 8, 4),
        32: LinearTile(32, 64, 128, 4, 4, 4),
        64: LinearTile(64, 64, 128, 4, 3, 4),
        128: LinearTile(64, 64, 128, 2, 3, 4),
    },
    (3072, 1536, 2, False): {
        8: LinearTile(8, 64, 128, 1, 5, 4),
        32: LinearTile(32, 64, 64, 1, 8, 4),
        64: LinearTile(64, 64, 64, 1, 6, 4),
        128: LinearTile(128, 64, 128, 1, 4, 4),
    },
    (2048, 2048, 2, False): {
        8: LinearTile(8, 64, 128, 2, 5, 4),
        32: LinearTile(32, 32, 128, 4, 6, 4),
        64: LinearTile(64, 32, 256, 2, 4, 4),
        128: LinearTile(64, 64, 128, 2, 3, 4),
    },
    (2816, 2048, 2, True): {
        8: LinearTile(8, 32, 128, 1, 5, 4),
        32: LinearTile(32, 64, 128, 1, 5, 4),
        64: LinearTile(64, 64, 128, 1, 4, 4),
        128: LinearTile(64, 64, 128, 1, 4, 4),
    },
    (2048, 2816, 2, False): {
        8: LinearTile(8, 128, 64, 4, 6, 4),
        32: LinearTile(32, 64, 128, 4, 4, 4),
        64: LinearTile(64, 64, 128, 4, 3, 4),
        128: LinearTile(64, 64, 128, 2, 3, 4),
    },
    (10944, 2048, 2, True): {
        8: LinearTile(8, 32, 128, 1, 5, 4),
        32: LinearTile(32, 64, 128, 1, 5, 4),
        64: LinearTile(64, 32, 128, 1, 3, 4),
        128: LinearTile(128, 64, 64, 1, 3, 4),
    },
    (102400, 2048, 2, False): {
        8: LinearTile(8, 32, 256, 1, 4, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
        64: LinearTile(64, 64, 128, 1, 3, 4),
        128: LinearTile(128, 64, 128, 1, 4, 4),
    },
    (2112, 3072, 2, False): {
        8: LinearTile(8, 64, 128, 4, 5, 4),
        32: LinearTile(32, 64, 128, 4, 4, 4),
    },
    (6144, 1536, 2, False): {
        8: LinearTile(8, 64, 128, 1, 5, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
    },
    (3072, 4096, 2, False): {
        8: LinearTile(8, 64, 128, 2, 5, 4),
        32: LinearTile(32, 128, 64, 4, 5, 8),
    },
    (6144, 3072, 2, True): {
        8: LinearTile(8, 64, 128, 1, 3, 4),
        32: LinearTile(32, 64, 64, 1, 5, 4),
    },
    (3072, 6144, 2, False): {
        8: LinearTile(8, 64, 128, 4, 5, 4),
        32: LinearTile(32, 64, 128, 2, 4, 4),
    },
    (131072, 3072, 2, False): {
        8: LinearTile(8, 32, 256, 1, 4, 4),
        32: LinearTile(32, 64, 128, 1, 4, 4),
    },
}
"""(rows, depth, bytes of an element, gated) → {most tokens: tile}. Filled from benchmarks/kernels/gemm.py; one and two
tokens are `held`'s, and on Hopper many are `linear_hopper`'s and `cuda.linear_cluster`'s."""


def linear_tile(tokens: int, rows: int, depth: int, width: int, gated: bool, device: torch.device | None = None) -> Tile:
    """For x [tokens, depth] and a matrix [rows, depth] (twice the rows if gated) of `width` bytes an element. device: one for
    whose own kernels the operands are fit."""
    held = held_tile(tokens, rows, depth, gated, width) if width <= 2 else None
    return streamed_tile(tokens, rows, depth, width, gated, device) if held is None else held


def streamed_tile(
    tokens: int, rows: int, depth: int, width: int, gated: bool, device: torch.device | None = None
) -> LinearTile | HopperTile | ClusterTile:
    """The same, of those that do not hold a row: also for one or two quantised ones."""
    hopper = None if device is None else hopper_tile(tokens, rows, depth, width, gated, device)
    if hopper is not None:
        return hopper
    for most, tile in MEASURED.get((rows, depth, width, gated), {}).items():
        if tokens <= most:
            return tile
    return rule(tokens, rows, depth, width, gated)


def rule(tokens: int, rows: int, depth: int, width: int, gated: bool) -> LinearTile:
    """A program or two for each multiprocessor, and enough bytes in flight for both."""
    wide = min(64, max(8, power_of_2(tokens)))
    parts = 2 if gated else 1
    if width == 1:
        return _fp8_rule(wide, rows, depth, parts)
    tile_rows = 16
    while tile_rows < 64 and rows * parts // (2 * tile_rows) >= 2 * HOPPER_MULTIPROCESSORS:
        tile_rows *= 2
    if wide > 16:
        # Every program reads all of x: fewer programs a column, then.
        tile_rows = max(tile_rows, 64)
    columns = -(-rows // tile_rows)
    splits = 1
    step = 128 if tile_rows >= 64 else 256
    while not gated and columns * splits * 2 <= HOPPER_MULTIPROCESSORS * 3 // 2 and depth // (2 * splits) >= 2 * step:
        splits *= 2
    stage = (tile_rows * parts + wide) * step * width
    stages = max(3, min(8, 96 * 1024 // stage))
    return LinearTile(wide, tile_rows, step, splits, stages)


def _fp8_rule(wide: int, rows: int, depth: int, parts: int) -> LinearTile:
    """Tiles on WGMMA, and columns split until two programs a multiprocessor are there: nearly what benchmarks/kernels/gemm.py
    found best of all (one H100); tiles of 16 rows took up to twice as long."""
    columns = -(-rows // 64)
    splits = 1
    while parts == 1 and 2 * columns * splits <= 2 * HOPPER_MULTIPROCESSORS and depth // (2 * splits) >= 2 * 128:
        splits *= 2
    stage = (64 * parts + wide) * 128
    return LinearTile(wide, 64, 128, splits, max(3, min(8, 96 * 1024 // stage)))
