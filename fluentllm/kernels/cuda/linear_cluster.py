"""y = x Wᵀ for few rows of x on Hopper, by clusters of programs that share 64 rows of the matrix: `linear_cluster.cu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..triton.launch import bulk_copies, launch, programmatic
from .launch import FLOAT, INT, LONG, MAP, POINTER, Boxes, CudaKernel

if TYPE_CHECKING:
    from torch import Tensor

    from ..triton.row_product import RowProduct

ROWS, BYTES, THREADS = 64, 128, 160
"""As in `linear_cluster.cu`."""
SHARED_BYTES = 113 * 1024
"""Of a program: two fit on a multiprocessor, this one and one of the next product."""
ELEMENTS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float16: 2}
TYPES = {torch.bfloat16: "Bf16", torch.float16: "Half", torch.float32: "float"}
"""Names in `hopper.cuh`."""

linear_cluster = CudaKernel(
    "linear_cluster", (MAP, MAP, *[POINTER] * 8, *[INT] * 8, *[LONG] * 3, FLOAT, INT, FLOAT, INT)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClusterTile:
    """Sizes of `cluster_product`."""

    tokens: int
    """8, 16, 32 or 64: rows of x, padded."""
    splits: int
    """Programs of a cluster, up to 8, which share a tile's depth: even parts, of which the last may be smaller."""

    @property
    def rows(self) -> int:
        """Of the matrix, in a tile."""
        return ROWS

    def each(self, tokens: int) -> int:
        """Pairs of `tokens` rows that a program finishes."""
        return -(-tokens // (2 * self.splits))

    def stages(self, tokens: int, depth: int, width: int, gated: bool) -> int:
        """Of a program's ring, for a matrix of `width` bytes an element; 0 or less: nothing fits."""
        stage = BYTES * ((2 if gated else 1) * ROWS + self.tokens)
        share = _share(depth, width, self.splits)
        # A stage's barriers are 16 bytes.
        return min(share, (SHARED_BYTES - self._beside(tokens, share, width, gated)) // (stage + 16))

    def shared_bytes(self, tokens: int, depth: int, width: int, gated: bool) -> int:
        """Shared memory of a program."""
        stage = BYTES * ((2 if gated else 1) * ROWS + self.tokens)
        beside = self._beside(tokens, _share(depth, width, self.splits), width, gated)
        return beside + self.stages(tokens, depth, width, gated) * (stage + 16)

    def fits(self, tokens: int, depth: int, width: int, gated: bool) -> bool:
        """Is there room for as many stages as are in flight at once (`IN_FLIGHT`), and for two?"""
        columns = self.tokens * (2 if gated else 1)
        least = 4 if columns <= 16 else 2
        return self.stages(tokens, depth, width, gated) >= min(least, _share(depth, width, self.splits))

    def _beside(self, tokens: int, share: int, width: int, gated: bool) -> int:
        """Bytes beside the ring: sums that are received, scales of tokens and weights, the norm's factors, a barrier."""
        halves = 2 if gated else 1
        sums = halves * self.splits * self.each(tokens) * 2 * ROWS * 4
        scales = 4 * halves * share * (self.tokens + 1) if width == 1 else 0
        return sums + scales + 4 * self.tokens + 16


def _share(depth: int, width: int, splits: int) -> int:
    """Steps of 128 bytes of a program."""
    steps = -(-depth * width // BYTES)
    return -(-steps // splits)


def cluster_product(product: RowProduct, tile: ClusterTile) -> None:
    """One of the ways of `linear`: both operands in BF16 (or float16), or in E4M3 with their scales. Raises `ValueError` for
    operands that TMA cannot read, and for a tile that does not fit them."""
    p = product
    width = p.weight.element_size()
    steps, share = -(-p.depth * width // BYTES), _share(p.depth, width, tile.splits)
    # So that none of them has nothing to do.
    tile = ClusterTile(tile.tokens, -(-steps // share))
    if not bulk_copies(p.x) or not bulk_copies(p.weight):
        raise ValueError("operands that TMA cannot read: their rows must be aligned to 16 bytes")
    if p.tokens > tile.tokens or not tile.fits(p.tokens, p.depth, width, p.gated):
        raise ValueError(f"{tile} does not fit {p.tokens} × {p.depth} into shared memory: take more splits")
    launch(
        linear_cluster, (-(-p.rows // ROWS) * tile.splits,), Boxes(p.x, (tile.tokens, BYTES // width)),
        Boxes(p.weight, (ROWS, BYTES // width)), p.out, p.x_scale, p.w_scale, p.other, p.residual, p.norm, p.squares,
        p.squares_out, p.tokens, p.rows, p.depth, p.scale_row, steps, share, tile.stages(p.tokens, p.depth, width, p.gated),
        tile.each(p.tokens), p.out.stride(0), p.other_row, p.residual_row, p.factor, p.parts, p.eps, p.normed,
        cluster=tile.splits, threads=THREADS, shared=tile.shared_bytes(p.tokens, p.depth, width, p.gated),
        **_macros(p, tile), **programmatic(p.x.device, "product"),
    )  # fmt: skip


def _macros(p: RowProduct, tile: ClusterTile) -> dict[str, Any]:
    def named(tensor: Tensor | None) -> str:
        return TYPES[p.out.dtype if tensor is None else tensor.dtype]

    return {
        "TOKENS": tile.tokens, "ELEMENT": ELEMENTS[p.weight.dtype], "HALVES": p.halves, "OUT": named(p.out),
        "OTHER": named(p.other), "RESIDUAL": named(p.residual), "NORM": named(p.norm),
    }  # fmt: skip
