"""Sorting (token, choice) pairs by expert on the device, and cutting each expert's pairs into tiles for a grouped product.

One program an expert: it counts all pairs, so it knows where its own begin, and then writes them in order. No atomics: the
order is the pairs' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096
"""Pairs that a program looks at together."""


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    order: Tensor
    """[T · K] int32: pairs (token · K + choice) by expert; behind the last expert's, anything."""
    offsets: Tensor
    """[E + 1] int32, first pair of each expert in `order`."""
    experts: Tensor
    """[tiles] int32, each tile's expert; -1 for tiles that nobody needs."""
    firsts: Tensor
    """[tiles] int32, each tile's first place in `order`."""
    rows: int
    """Of a full tile."""


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _sort_kernel(order, offsets, tile_experts, tile_firsts, ids, pairs, tiles, EXPERTS: tl.constexpr, BINS: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for base in range(0, pairs, BLOCK):
        pair = base + tl.arange(0, BLOCK)
        chosen = tl.load(ids + pair, mask=pair < pairs, other=EXPERTS)
        # Zero experts compute nothing: they share the bin behind the last expert.
        counts += tl.histogram(tl.minimum(chosen, EXPERTS), BINS)
    start_next(PDL, LOADED)
    needed = tl.where(bins < EXPERTS, tl.cdiv(counts, ROWS), 0)
    offset = tl.sum(tl.where(bins < expert, counts, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    tile = tl.sum(tl.where(bins < expert, needed, 0), 0)
    tl.store(offsets + expert, offset)
    if expert == EXPERTS - 1:
        tl.store(offsets + EXPERTS, offset + count)
        total = tl.sum(needed, 0)
        for base in range(total, tiles, BLOCK):
            unused = base + tl.arange(0, BLOCK)
            tl.store(tile_experts + unused, unused * 0 - 1, mask=unused < tiles)
    for base in range(0, tl.cdiv(count, ROWS), BLOCK):
        i = base + tl.arange(0, BLOCK)
        mine = i < tl.cdiv(count, ROWS)
        tl.store(tile_experts + tile + i, i * 0 + expert, mask=mine)
        tl.store(tile_firsts + tile + i, offset + i * ROWS, mask=mine)
    if count > 0:
        written = offset
        for base in range(0, pairs, BLOCK):
            pair = base + tl.arange(0, BLOCK)
            mine = (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
            place = written + tl.cumsum(mine, 0) - 1
            tl.store(order + place, pair, mask=mine > 0)
            written += tl.sum(mine, 0)


def sort_by_expert(ids: Tensor, experts: int, rows: int) -> ExpertTiles:
    """ids [T, K] int32, contiguous; ids of `experts` or more are left out; tiles of `rows` pairs.

    Reference: `Tensor.argsort(stable=True)`."""
    pairs, device = ids.numel(), ids.device
    # Σ ceil(count / rows) ≤ pairs / rows + the experts that are chosen at all.
    tiles = min(pairs, pairs // rows + min(experts, pairs))
    order, first, expert = (torch.empty(n, dtype=torch.int32, device=device) for n in (pairs, tiles, tiles))
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    block = min(BLOCK, max(32, power_of_2(pairs)))
    launch(
        _sort_kernel, (experts,), order, offsets, expert, first, ids, pairs, tiles,
        EXPERTS=experts, BINS=power_of_2(experts + 1), ROWS=rows, BLOCK=block, num_warps=max(4, block // 256),
        **programmatic(device),
    )  # fmt: skip
    return ExpertTiles(order, offsets, expert, first, rows)
