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

from .language import FIRST, LOADED, scatter, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096
"""Pairs that a program looks at together."""
SOME: tl.constexpr = tl.constexpr(128)
"""Tiles that it writes together: an expert seldom has more."""


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
    used: Tensor
    """[1] int32, how many tiles somebody needs; they come first."""
    rows: int
    """Of a full tile."""


@triton.jit
def _two(low, high):
    """Counts below 2³¹ in one number; sums of such are two sums."""
    return low.to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def _both(sums):
    return (sums & 0xFFFFFFFF).to(tl.int32), (sums >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _sort_kernel(order, offsets, tile_experts, tile_firsts, ids, tokens, tiles, EACH: tl.constexpr, EXPERTS: tl.constexpr,
                 BINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    # Seen to be a multiple, so that masks do not break up the loads.
    pairs = tokens * EACH
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for base in range(0, pairs, BLOCK):
        pair = base + tl.arange(0, BLOCK)
        chosen = tl.load(ids + pair, mask=pair < pairs, other=EXPERTS)
        # Zero experts compute nothing: they share the bin behind the last expert.
        counts += tl.histogram(tl.minimum(chosen, EXPERTS), BINS)
    start_next(PDL, LOADED)
    needed = tl.where(bins < EXPERTS, tl.cdiv(counts, ROWS), 0)
    # Two sums in one: a reduction over all warps takes longer than what it adds up.
    pairs_of = _two(tl.where(bins < expert, counts, 0), tl.where(bins == expert, counts, 0))
    tiles_of = _two(tl.where(bins < expert, needed, 0), needed)
    offset, count = _both(tl.sum(pairs_of, 0))
    tile, total = _both(tl.sum(tiles_of, 0))
    tl.store(offsets + expert, offset)
    some = tl.arange(0, SOME)
    if expert == EXPERTS - 1:
        tl.store(offsets + EXPERTS, offset + count)
        tl.store(offsets + EXPERTS + 1, total)
        for base in range(total, tiles, SOME):
            tl.store(tile_experts + base + some, some * 0 - 1, mask=base + some < tiles)
    mine = tl.cdiv(count, ROWS)
    for base in range(0, mine, SOME):
        i = base + some
        tl.store(tile_experts + tile + i, i * 0 + expert, mask=i < mine)
        tl.store(tile_firsts + tile + i, offset + i * ROWS, mask=i < mine)
    if count > 0:
        written = offset
        for base in range(0, pairs, BLOCK):
            pair = base + tl.arange(0, BLOCK)
            chosen = (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
            place = written + tl.cumsum(chosen, 0) - 1
            scatter(order + place, pair, chosen > 0)
            written += tl.sum(chosen, 0)


def sort_by_expert(ids: Tensor, experts: int, rows: int) -> ExpertTiles:
    """ids [T, K] int32, contiguous; ids of `experts` or more are left out; tiles of `rows` pairs.

    Reference: `Tensor.argsort(stable=True)`."""
    pairs, device = ids.numel(), ids.device
    # Σ ceil(count / rows) ≤ pairs / rows + the experts that are chosen at all.
    tiles = min(pairs, pairs // rows + min(experts, pairs))
    order, first, expert = (torch.empty(n, dtype=torch.int32, device=device) for n in (pairs, tiles, tiles))
    offsets = torch.empty(experts + 2, dtype=torch.int32, device=device)
    block = min(BLOCK, max(32, power_of_2(pairs)))
    launch(
        _sort_kernel, (experts,), order, offsets, expert, first, ids, ids.shape[0], tiles,
        EACH=ids.shape[1], EXPERTS=experts, BINS=power_of_2(experts + 1), ROWS=rows, BLOCK=block,
        num_warps=max(4, block // 256), **programmatic(device),
    )  # fmt: skip
    return ExpertTiles(order, offsets[:-1], expert, first, offsets[-1:], rows)
