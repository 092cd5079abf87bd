"""The routed experts of a layer: chooses between the small-batch kernels and sorted, grouped products, by shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .moe_combine import combine
from .moe_grouped import grouped_down, grouped_gate_up, tile_for
from .moe_small import small_moe
from .moe_sort import sort_by_expert

if TYPE_CHECKING:
    from torch import Tensor

SMALL_TOKENS = 2
"""Up to here two tokens seldom share an expert, and sorting costs more than it saves."""


def experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None = None) -> Tensor:
    """Σ_k weights[t, k] · expert(ids[t, k], x[t]) + shared[t] → [T, hidden] in x's dtype.

    x [T, hidden]; weights [T, K] float32 and ids [T, K] int32 of `moe_route.route`, ids of E or more being zero experts;
    gate_up [E, 2 · inner, hidden] (gate rows first), down [E, hidden, inner]. Every sum is in the order of its own token's
    choices.
    Reference: `kernels.moe.combine_reference`.
    """
    if x.shape[0] <= SMALL_TOKENS:
        return small_moe(x, weights, ids, gate_up, down, shared)
    count = down.shape[0]
    tile = tile_for(ids.numel(), count)
    tiles = sort_by_expert(ids, count, tile.rows)
    h = grouped_gate_up(x, gate_up, tiles, ids.shape[1], tile)
    return combine(grouped_down(h, down, tiles, tile), x, weights, ids, count, shared)
