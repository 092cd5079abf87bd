"""Splitting one decode over the chip, on the device: which CTA reads which pages of which sequences.

Nothing of it is read by the host, so it lives inside a CUDA graph; one plan serves every layer of a step. Two ways, and the
one that ends sooner is taken:

- whole pieces: every part is one run of pages of one sequence. The longest run T is the least with Σ ⌈pages / T⌉ ≤ parts.
- one axis: all sequences' pages are laid end to end, `OVERHEAD` page lengths before each for what starting it costs, and the
  axis is cut into equal tiles; a part may end one sequence and begin others. Right for many or very uneven sequences.

A sequence that spans several parts is finished by the combine kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .. import in_kernels
from ..triton.launch import launch, power_of_2
from .layout import PAGE

if TYPE_CHECKING:
    from torch import Tensor

OVERHEAD = 2
"""Pages that starting a sequence is worth."""
SLACK = 2
"""Pages by which whole pieces may be longer than tiles. A part that ends one sequence and begins another drains its pipeline in
between; at 32 sequences of 4,096 keys whole pieces were 5 µs faster (H100). By counting pages and `OVERHEAD` a piece alone, 0
would be right, and 11 % shorter at 48 or 100 sequences of 1,024 keys, at most 2 % for longer ones: not measured."""
SEARCH_STEPS = 20
"""Halvings in the search for T: up to 2²⁰ pages in one sequence."""
RECORD = 16
"""Numbers of a record: 64 bytes."""
PAGES_AT = 8
"""Where the first pages' ids are in it."""


@dataclass(slots=True)
class DecodePlan:
    """The split of one step. Buffers stay where they are: graphs capture them."""

    parts: int
    lengths: Tensor
    """[N] int32, the caller's: keys of each sequence."""
    starts: Tensor
    """[N] int32: where a sequence's first page lies on the axis."""
    spans: Tensor
    """[N, 2] int32: first and last part of each sequence; (0, -1) of an inert one."""
    records: Tensor
    """[parts, 16] int32, what a CTA must know first, in one piece of a cache line: its sequences [begin, end), where the part
    ends on the axis, then its first piece: first and last + 1 page, keys; from `PAGES_AT` on the ids of its first pages, if
    there is a page table."""
    page_table: Tensor | None = None
    """[N, P] int32, the caller's, rows contiguous; read at every `refresh`."""
    counters: Tensor | None = None
    """[N, groups of rows · 2] int32: finished splits of each sequence since the last `refresh`, where its CTAs wait for each
    other (`hopper_merge`)."""

    @property
    def pages(self) -> int:
        """Ids of pages in a record."""
        return 0 if self.page_table is None else RECORD - PAGES_AT

    def refresh(self) -> None:
        """Compute the plan from `lengths` (and `page_table`) as they are when the stream gets here."""
        count = self.lengths.shape[0]
        if in_kernels(self.lengths):
            table, cells = self.page_table, 0 if self.counters is None else self.counters.shape[1]
            launch(
                plan_kernel, (self.parts,),
                self.lengths, self.starts, self.spans, self.records, table, self.counters, count,
                0 if table is None else table.stride(0), CELLS=cells, PARTS=self.parts, OVERHEAD=OVERHEAD, SLACK=SLACK,
                PAGE=PAGE, STEPS=SEARCH_STEPS, RECORD=RECORD, PAGES_AT=PAGES_AT, BLOCK=power_of_2(count), num_warps=4,
            )  # fmt: skip
        else:
            plan_reference(self)


def new_plan(lengths: Tensor, parts: int, *, page_table: Tensor | None = None, cells: int = 0) -> DecodePlan:
    """A plan for sequences of `lengths` (int32 [N], read at every `refresh`), cut into `parts`, and computed once. With
    `page_table` (int32 [N, P]) records hold pages' ids; `cells`: counters of a sequence."""
    plan = DecodePlan(
        parts=parts,
        lengths=lengths,
        # All of it is written below: zeros would be a launch each.
        starts=torch.empty_like(lengths),
        spans=torch.empty(lengths.shape[0], 2, dtype=torch.int32, device=lengths.device),
        records=torch.empty(parts, RECORD, dtype=torch.int32, device=lengths.device),
        page_table=page_table,
        counters=torch.empty(lengths.shape[0], cells, dtype=torch.int32, device=lengths.device) if cells else None,
    )
    plan.refresh()
    return plan


def plan_reference(plan: DecodePlan) -> None:
    """The same in plain Python."""
    lengths = plan.lengths.tolist()
    pages = [-(-keys // PAGE) for keys in lengths]
    tile = max(1, -(-sum(count + OVERHEAD * (count > 0) for count in pages) // plan.parts))
    longest = 2**SEARCH_STEPS
    shortest = min(longest, max(1, -(-sum(pages) // plan.parts)))
    run = next((t for t in range(shortest, max(1, *pages) + 1) if _runs(pages, t) <= plan.parts), longest)
    position = part = 0
    starts: list[int] = []
    spans: list[list[int]] = []
    records: list[list[int]] = []
    for i, count in enumerate(pages):
        position += OVERHEAD * (count > 0)
        starts.append(position)
        splits = -(-count // run)
        whole = [[i, i + 1, 0, k * count // splits, (k + 1) * count // splits, lengths[i]] for k in range(splits)]
        spans.append([part, part + splits - 1] if count else [0, -1])
        records += whole
        part += splits
        position += count
    if part > plan.parts or run > tile + SLACK:
        spans = [[s // tile, (s + n - 1) // tile] if n else [0, -1] for s, n in zip(starts, pages, strict=True)]
        records = [_tile_record(starts, pages, lengths, p * tile, (p + 1) * tile) for p in range(plan.parts)]
    plan.starts.copy_(torch.tensor(starts, dtype=torch.int32))
    plan.spans.copy_(torch.tensor(spans, dtype=torch.int32))
    plan.records.zero_()
    records = [_filled(record, plan.page_table) for record in records]
    plan.records[: len(records)] = torch.tensor(records, dtype=torch.int32).view(-1, RECORD)
    if plan.counters is not None:
        plan.counters.zero_()


def _filled(record: list[int], table: Tensor | None) -> list[int]:
    """A record with its first pages, in full length."""
    begin, end, _, first, last, _ = record
    ids = table[begin, first:last].tolist() if table is not None and begin < end else []
    record = record + [0] * (PAGES_AT - len(record)) + ids[: RECORD - PAGES_AT]
    return record + [0] * (RECORD - len(record))


def _runs(pages: list[int], longest: int) -> int:
    return sum(-(-count // longest) for count in pages)


def _tile_record(starts: list[int], pages: list[int], lengths: list[int], low: int, high: int) -> list[int]:
    begin = sum(start + count <= low for start, count in zip(starts, pages, strict=True))
    end = sum(start < high for start in starts)
    at = min(begin, len(pages) - 1)
    return [begin, end, high, max(0, low - starts[at]), min(pages[at], high - starts[at]), lengths[at]]


@triton.jit
def plan_kernel(
    lengths, starts, spans, records, page_table, counters, count, table_width, CELLS: tl.constexpr, PARTS: tl.constexpr,
    OVERHEAD: tl.constexpr, SLACK: tl.constexpr, PAGE: tl.constexpr, STEPS: tl.constexpr, RECORD: tl.constexpr,
    PAGES_AT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (PARTS,): every program computes the whole plan and writes its part's record; the first also the rest."""
    part = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    inside = index < count
    keys = tl.load(lengths + index, mask=inside, other=0)
    pages = (keys + PAGE - 1) // PAGE
    weights = pages + OVERHEAD * (pages > 0).to(tl.int32)
    ends = tl.cumsum(weights, 0)
    begins = ends - pages
    tile = tl.maximum((tl.sum(weights, 0) + PARTS - 1) // PARTS, 1)
    # Invariant: runs of `run` fit; runs of `too_short` do not (or it is 0).
    run = 1 << STEPS
    too_short = 0
    for _ in range(STEPS):
        middle = (run + too_short) // 2
        fits = tl.sum((pages + middle - 1) // middle, 0) <= PARTS
        run = tl.where(fits, middle, run)
        too_short = tl.where(fits, too_short, middle)
    splits = (pages + run - 1) // run
    split_ends = tl.cumsum(splits, 0)
    split_begins = split_ends - splits
    record = records + part * RECORD
    if (tl.sum(splits, 0) <= PARTS) & (run <= tile + SLACK):
        mine = ((split_begins <= part) & (part < split_ends)).to(tl.int32)
        own_pages = tl.sum(pages * mine, 0)
        own_splits = tl.maximum(tl.sum(splits * mine, 0), 1)
        own = part - tl.sum(split_begins * mine, 0)
        sequence = tl.sum(index * mine, 0)
        used = tl.sum(mine, 0)
        begin = sequence
        end = sequence + used
        high = 0
        first_page = own * own_pages // own_splits * used
        last_page = (own + 1) * own_pages // own_splits * used
        own_keys = tl.sum(keys * mine, 0)
        first = tl.where(pages > 0, split_begins, 0)
        last = tl.where(pages > 0, split_ends - 1, -1)
    else:
        low = part * tile
        high = low + tile
        begin = tl.sum((inside & (ends <= low)).to(tl.int32), 0)
        end = tl.sum((inside & (begins < high)).to(tl.int32), 0)
        chosen = (index == tl.minimum(begin, count - 1)).to(tl.int32)
        start = tl.sum(begins * chosen, 0)
        first_page = tl.maximum(low - start, 0)
        last_page = tl.minimum(tl.sum(pages * chosen, 0), high - start)
        own_keys = tl.sum(keys * chosen, 0)
        first = tl.where(pages > 0, begins // tile, 0)
        last = tl.where(pages > 0, (ends - 1) // tile, -1)
    tl.store(record, begin)
    tl.store(record + 1, end)
    tl.store(record + 2, high)
    tl.store(record + 3, first_page)
    tl.store(record + 4, last_page)
    tl.store(record + 5, own_keys)
    for unused in tl.static_range(6, PAGES_AT):
        tl.store(record + unused, 0)
    ahead = tl.arange(0, RECORD - PAGES_AT)
    if page_table is None:
        tl.store(record + PAGES_AT + ahead, ahead * 0)
    else:
        there = first_page + ahead < tl.where(begin < end, last_page, 0)
        ids = tl.load(page_table + begin.to(tl.int64) * table_width + first_page + ahead, mask=there, other=0)
        tl.store(record + PAGES_AT + ahead, ids)
    if part == 0:
        for cell in tl.static_range(CELLS):
            tl.store(counters + index * CELLS + cell, index * 0, mask=inside)
        tl.store(starts + index, begins, mask=inside)
        tl.store(spans + 2 * index, first, mask=inside)
        tl.store(spans + 2 * index + 1, last, mask=inside)
