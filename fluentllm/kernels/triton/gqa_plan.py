"""Dividing the keys of a decode batch among programs, on the device, once a step before the first layer.

The work is a list of items (sequence, run of keys); how many there can be depends on shapes only, so the grid of the
attention kernel is fixed and the lengths stay on the device.

The plan is launched normally and lets nobody start before it has ended. So what is launched behind it finds the plan, and all
that was there before it (lengths, page tables, older keys), without waiting for the kernels directly in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launch import launch, multiprocessors, power_of_2

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Runs of keys start at multiples of this."""
LEAST_RUN = 64
"""One block: at batch 1 a chain of two blocks takes longer than merging two runs (H100, 16 and 32 heads, 1,024 keys)."""
PER_MULTIPROCESSOR = 2
"""Programs of attention that fit on one. A single one keeps too few keys in flight: 1 × 131,072 keys of 8 heads took 155 µs by
132 programs, and 131 by 264 (H200)."""
LONGER, LONGER_STEPS = 16, 32
"""Runs may be longer than equal shares, by up to LONGER - 1 of LONGER_STEPS parts, if all then find a place at once: 32 × 4,096
keys took 131 µs in whole runs, and 138 in twice as many that need two turns."""
NO_LIMIT = tl.constexpr(2**31 - 1)
"""Keys of a run, where no limit that was tried would do."""
MERGE_INSIDE = False
"""Let the last program of a sequence merge its runs: a launch less a layer, and slower at batch 1 (H100, 16 heads, 1,024
keys), equal at 32."""


@dataclass(frozen=True, slots=True)
class GqaPlan:
    items: Tensor
    """[I] int32, sequence of each item; -1 for items that nobody needs."""
    starts: Tensor
    """[N + 1] int32, first item of each sequence, which has at least one."""
    spans: Tensor
    """[N] int32, keys of each of a sequence's runs but its last, a multiple of `BLOCK`."""
    single: bool
    """No sequence can have more than one item, so nothing needs merging."""
    counters: Tensor | None = None
    """[N · KV heads · tiles] int32, zeros between calls: programs count themselves there, and a sequence's last one merges.
    None: runs are merged by a launch of their own. Calls that may run at the same time must not share a plan with counters."""


@triton.jit
def _longest_run(length, present, parts, BLOCK: tl.constexpr, LEAST: tl.constexpr, LONGER: tl.constexpr,
                 LONGER_STEPS: tl.constexpr):  # fmt: skip
    """length [N], of which those `present` count → (the shortest limit of runs of which there are no more than `parts`, or
    `NO_LIMIT`; that of equal shares)"""
    share = tl.maximum(tl.cdiv(tl.sum(length, 0), parts), LEAST)
    limits = tl.cdiv(share + share * tl.arange(0, LONGER) // LONGER_STEPS, BLOCK) * BLOCK
    runs = tl.where(present[None, :], tl.maximum(tl.cdiv(length[None, :], limits[:, None]), 1), 0)
    return tl.min(tl.where(tl.sum(runs, 1) <= parts, limits, NO_LIMIT), 0), tl.cdiv(share, BLOCK) * BLOCK


@triton.jit
def _plan_kernel(items, starts, spans, counters, lengths, n, count, parts, cells, N: tl.constexpr,
                 SPAN: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr, LONGER: tl.constexpr,
                 LONGER_STEPS: tl.constexpr, FILL: tl.constexpr):  # fmt: skip
    i = tl.arange(0, N)
    length = tl.load(lengths + i, mask=i < n, other=0)
    if SPAN == 0:
        # In one turn of all places, or else in two, of which the second evens out what the first leaves.
        once, _ = _longest_run(length, i < n, parts, BLOCK, LEAST, LONGER, LONGER_STEPS)
        twice, shares = _longest_run(length, i < n, 2 * parts, BLOCK, LEAST, LONGER, LONGER_STEPS)
        limit = tl.where(once < NO_LIMIT, once, tl.where(twice < NO_LIMIT, twice, shares))
    else:
        limit = SPAN
    # An empty sequence has one item too: its program writes zeros.
    runs = tl.where(i < n, tl.maximum(tl.cdiv(length, limit), 1), 0)
    end = tl.cumsum(runs, 0)
    start = end - runs
    if SPAN == 0:
        # Runs of one sequence are made equal: ceil(length / runs) ≤ limit, so their number stays.
        span = tl.cdiv(tl.cdiv(length, tl.maximum(runs, 1)), BLOCK) * BLOCK
    else:
        span = runs * 0 + SPAN
    total = tl.sum(runs, 0)
    tl.store(starts + i, start, mask=i < n)
    tl.store(starts + n, total)
    tl.store(spans + i, span, mask=i < n)
    for run in range(0, tl.max(runs, 0)):
        tl.store(items + start + run, i, mask=(run < runs) & (start + run < count))
    for base in range(0, count, FILL):
        unused = base + tl.arange(0, FILL)
        tl.store(items + unused, unused * 0 - 1, mask=(unused >= total) & (unused < count))
    if counters is not None:
        for base in range(0, cells, FILL):
            cell = base + tl.arange(0, FILL)
            tl.store(counters + cell, cell * 0, mask=cell < cells)


def plan_gqa(
    lengths: Tensor, *, kv_heads: int, longest: int, fixed_span: int = 0, tiles: int = 1, inside: bool | None = None
) -> GqaPlan:  # fmt: skip
    """lengths [N] int32, keys of each sequence on the device, 0 allowed; longest: host bound of them.

    Aims at `PER_MULTIPROCESSOR` programs a multiprocessor over all `kv_heads`, whose queries make `tiles` tiles each
    (`gqa_decode.query_tiles`). `fixed_span` (keys, a multiple of `BLOCK`) makes runs the same whatever else is in the batch:
    deterministic mode. inside: merge inside the attention kernel (`MERGE_INSIDE` unless given). Reference:
    `gqa_plan_reference`.
    """
    n = lengths.shape[0]
    if fixed_span % BLOCK:
        raise ValueError(f"fixed_span is {fixed_span}, a multiple of {BLOCK} is expected")
    parts = max(1, multiprocessors(lengths.device) * PER_MULTIPROCESSOR // (kv_heads * tiles))
    most = max(1, -(-longest // (fixed_span or LEAST_RUN)))
    count = n * most
    if not fixed_span:
        # Σ max(1, ceil(length / limit)) < Σ length / limit + N: 2 · parts + N with the shortest limit that there can be, and
        # at most parts with the longest for one turn where N is small.
        fits = n * (LONGER_STEPS + LONGER - 1) <= parts * (LONGER - 1)
        count = min(count, parts if fits else 2 * parts + n - 1)
    items = torch.empty(max(count, 1), dtype=torch.int32, device=lengths.device)
    starts = torch.empty(n + 1, dtype=torch.int32, device=lengths.device)
    spans = torch.empty(max(n, 1), dtype=torch.int32, device=lengths.device)
    single = most <= 1
    cells = 0 if single or not (MERGE_INSIDE if inside is None else inside) else n * kv_heads * tiles
    counters = torch.empty(cells, dtype=torch.int32, device=lengths.device) if cells else None
    launch(
        _plan_kernel, (1,), items, starts, spans, counters, lengths, n, count, parts, cells,
        N=power_of_2(n), SPAN=fixed_span, BLOCK=BLOCK, LEAST=LEAST_RUN, LONGER=LONGER, LONGER_STEPS=LONGER_STEPS, FILL=1024,
        num_warps=4,
    )  # fmt: skip
    return GqaPlan(items[:count], starts, spans, single, counters)


def gqa_plan_reference(
    lengths: list[int], count: int, parts: int, fixed_span: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """(items, starts, spans) in plain Python."""
    limit = fixed_span or _longest_run_reference(lengths, parts)
    items: list[int] = []
    starts, spans = [0], []
    for i, length in enumerate(lengths):
        runs = max(1, -(-length // limit))
        spans.append(fixed_span or -(-length // (runs * BLOCK)) * BLOCK)
        items += [i] * runs
        starts.append(len(items))
    return items + [-1] * (count - len(items)), starts, spans


def _longest_run_reference(lengths: list[int], parts: int) -> int:
    for places in (parts, 2 * parts):
        share = max(-(-sum(lengths) // places), LEAST_RUN)
        limits = [-(-(share + share * longer // LONGER_STEPS) // BLOCK) * BLOCK for longer in range(LONGER)]
        for limit in limits:
            if sum(max(1, -(-length // limit)) for length in lengths) <= places:
                return limit
    return limits[0]
