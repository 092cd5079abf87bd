"""y = x Wᵀ for few rows of x, in one of four ways: `held` for one or two tokens; on Hopper `cuda.linear_cluster` and
`linear_hopper` for most others up to 32 in BF16 and 64 in FP8; else `linear_streamed`. Which one, and how, is `linear_tiles`'
to say.

Both ends of an RMS norm can be the product's: what it leaves at the end of one product, and what it applies in the next
(`normed.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..cuda.linear_cluster import ClusterTile, cluster_product
from .held import HeldTile, held_product
from .hopper_tiles import HopperTile
from .linear_hopper import hopper_product, takes
from .linear_streamed import streamed_product
from .linear_tiles import LinearTile, Tile, linear_tile, streamed_tile
from .normed import Normed, opened
from .row_product import RowProduct

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import NormAfter


def new_counters(rows: int, device: torch.device) -> Tensor:
    """What `linear` counts finished programs in, for one matrix of `rows` rows: zeros between calls. Calls that may run at the
    same time must not share it."""
    return torch.zeros(4 * -(-rows // 16), dtype=torch.int32, device=device)


def linear(
    x: Tensor | Normed,
    weight: Tensor,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    gated: bool = False,
    other: Tensor | None = None,
    factor: float = 1.0,
    counters: Tensor | None = None,
    tile: Tile | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]; x's last dimension contiguous.

    BF16 (float16, float32 too); or both E4M3 with x_scale float32 [⌈K / 128⌉, T] (`fp8_quantise.quantise_rows`) and w_scale
    float32 [⌈N / 128⌉, ⌈K / 128⌉] → `out_dtype`, BF16 unless given; or x in BF16 and the weight in E4M3 with w_scale, where
    `holds` says so.
    gated: weight holds gate rows, then as many up rows (with scales a multiple of 128) → silu(gate) · up, [T, N / 2].
    other [T, N], or [N] for all rows → (product + other) · factor.
    counters: `new_counters` of this matrix; without them `linear_streamed` does not split columns.
    Reference: `F.linear`; with scales `kernels.block_fp8.linear_reference`.
    """
    out, _ = _product(
        x, weight, None, x_scale=x_scale, w_scale=w_scale, gated=gated, other=other, factor=factor, counters=counters,
        tile=tile, out_dtype=out_dtype,
    )  # fmt: skip
    return out


def linear_norm(
    x: Tensor | Normed,
    weight: Tensor,
    after: NormAfter,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    other: Tensor | None = None,
    counters: Tensor | None = None,
    tile: Tile | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Normed, Tensor]:
    """As `linear`, then `after` → the first columns [T, D], normed but for their factor, and the whole product [T, N], whose
    first columns are these. Reference: `PlainOps.add_rms_norm`, `PlainOps.rms_norm`."""
    out, squares = _product(
        x, weight, after, x_scale=x_scale, w_scale=w_scale, other=other, counters=counters, tile=tile, out_dtype=out_dtype
    )
    assert squares is not None
    return Normed(out[:, : after.weight.shape[0]], squares, after.eps), out


def holds(tokens: int, rows: int, depth: int, gated: bool) -> bool:
    """Is x [tokens, depth] multiplied by an E4M3 matrix [rows, depth] (gated: twice the rows) as it is, not quantised?"""
    return isinstance(linear_tile(tokens, rows, depth, 1, gated), HeldTile)


def takes_norm(tokens: int, rows: int, depth: int, width: int, normed: int, device: torch.device) -> bool:
    """Can `linear_norm` norm the first `normed` columns? No tile may hold columns of both kinds."""
    tile = linear_tile(tokens, rows, depth, width, False, device)
    return normed == rows or isinstance(tile, HeldTile) or normed % tile.rows == 0


def _product(
    x: Tensor | Normed,
    weight: Tensor,
    after: NormAfter | None,
    *,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    other: Tensor | None,
    counters: Tensor | None,
    tile: Tile | None,
    out_dtype: torch.dtype | None,
    gated: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """→ the product, and Σ x² of the columns that `after` norms, by tiles."""
    x, before, _, eps = opened(x)
    tokens, depth = x.shape
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(tokens, rows, dtype=out_dtype or (x.dtype if x_scale is None else torch.bfloat16), device=x.device)
    if tile is None:
        choose = linear_tile if x_scale is None else streamed_tile
        device = x.device if takes(x, weight) else None
        tile = choose(tokens, rows, depth, weight.element_size(), gated, device)
    squares = residual = norm = None
    if after is not None:
        residual, norm = after.residual, after.weight
        squares = torch.empty(-(-norm.shape[0] // tile.rows), tokens, dtype=torch.float32, device=x.device)
    product = RowProduct(
        x=x, weight=weight, out=out, x_scale=x_scale, w_scale=w_scale, gated=gated, squares=before, eps=eps, other=other,
        factor=factor, residual=residual, norm=norm, squares_out=squares, counters=counters,
    )  # fmt: skip
    if isinstance(tile, HeldTile):
        held_product(product, tile)
        return out, squares
    if tokens and (x_scale is None) != (w_scale is None):
        raise ValueError(f"{tokens} rows by an E4M3 matrix must be quantised: x_scale is missing (`holds` tells)")
    if product.normed not in (0, rows) and (product.normed % tile.rows or residual is not None):
        raise ValueError(f"{product.normed} normed columns of {rows} do not fit tiles of {tile.rows}")
    if isinstance(tile, ClusterTile):
        cluster_product(product, tile)
    elif isinstance(tile, HopperTile):
        hopper_product(product, tile)
    else:
        streamed_product(product, tile)
    return out, squares


__all__ = ["LinearTile", "holds", "linear", "linear_norm", "new_counters", "takes_norm"]
