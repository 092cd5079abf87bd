"""The routed experts of a layer: chooses between the small-batch kernels and sorted, grouped products, by shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fp8_quantise import quantise_rows
from .moe_combine import combine
from .moe_grouped import grouped_down, grouped_gate_up
from .moe_pack import pack
from .moe_persistent import persistent, persistent_down, persistent_gate_up, tile_rows
from .moe_small import small_moe
from .moe_sort import sort_by_expert
from .moe_stream import stream_down, stream_gate_up
from .moe_tiles import tile_for

if TYPE_CHECKING:
    from torch import Tensor

    from .moe_tiles import Tile
    from .normed import NormAfter, Normed

SMALL_TOKENS = 2
"""Up to here two tokens seldom share an expert, and sorting costs more than it saves."""


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: Tensor | None = None,
    *,
    tile: Tile | None = None,
    after: NormAfter | None = None,
) -> Tensor | Normed:
    """Σ_k weights[t, k] · expert(ids[t, k], x[t]) + shared[t] → [T, hidden] in x's dtype.

    x [T, hidden]; weights [T, K] float32 and ids [T, K] int32 of `moe_route.route`, ids of E or more being zero experts;
    gate_up [E, 2 · inner, hidden] (gate rows first), down [E, hidden, inner]. Every sum is in the order of its own token's
    choices. `tile`: sort, and take this one, whatever T is (deterministic mode). `after`: as `moe_combine.combine`.
    Reference: `kernels.moe.combine_reference`.
    """
    if x.shape[0] <= SMALL_TOKENS and tile is None:
        return small_moe(x, weights, ids, gate_up, down, shared, after)
    count = down.shape[0]
    tile = tile or tile_for(ids.numel(), count, gate_up.element_size())
    tiles = sort_by_expert(ids, count, tile.rows)
    if tile.swapped:
        y = stream_down(stream_gate_up(x, gate_up, tiles, ids.shape[1], tile), down, tiles, tile)
    else:
        y = grouped_down(grouped_gate_up(x, gate_up, tiles, ids.shape[1], tile), down, tiles, tile)
    return combine(y, x, weights, ids, count, shared, after)


def fp8_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    shared: Tensor | None = None,
    *,
    tile: Tile | None = None,
    after: NormAfter | None = None,
) -> Tensor | Normed:
    """As `experts`, with matrices in block FP8: (E4M3, scale), gate_up [E, 2 · inner, hidden] and float32 [E, 2 · inner / 128,
    ⌈hidden / 128⌉], down [E, hidden, inner] and [E, hidden / 128, inner / 128]; hidden and inner multiples of 128.
    Activations are quantised in front of each product. Hopper takes the persistent kernel, unless a tile is given; for one
    token too, where `moe_small` over E4M3 took 57 µs instead of 32 (one H200, DeepSeek-V3-Lite's eight experts).
    Reference: `kernels.moe.combine_reference` of the dequantised operands.
    """
    count = down[0].shape[0]
    if tile is None and persistent(x.device):
        tiles = sort_by_expert(ids, count, tile_rows(ids.numel(), count))
        h = persistent_gate_up(*pack(x, tiles, ids.shape[1]), *gate_up, tiles)
        y = persistent_down(*quantise_rows(h), *down, tiles)
        return combine(y, x, weights, ids, count, shared, after)
    tile = tile or tile_for(ids.numel(), count, 1)
    tiles = sort_by_expert(ids, count, tile.rows)
    q, scale = quantise_rows(x)
    h = stream_gate_up(q, gate_up[0], tiles, ids.shape[1], tile, x_scale=scale, w_scale=gate_up[1])
    q, scale = quantise_rows(h)
    y = stream_down(q, down[0], tiles, tile, x_scale=scale, w_scale=down[1])
    return combine(y, x, weights, ids, count, shared, after)
