"""Merging where splits were computed (`hopper_merge`) replayed in torch: who merges which rows and columns, who waits for whom.

The CTAs' halves are generators; whoever calls chooses which of them goes on next, so every order that a chip could take can be
tried without one.
"""

from __future__ import annotations

import math
from functools import partial as bound
from typing import TYPE_CHECKING, NamedTuple

import torch

from .layout import LATENT, PAGE
from .replay import Piece, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from .plan import DecodePlan

FEW, FEW_ROWS = 8, 4
"""Of `hopper_merge`."""
ROW_TILE, HALF_COLUMNS = 64, LATENT // 2


class Share(NamedTuple):
    """Rows and columns of a sequence's output that one split's CTA merges."""

    rows: range
    columns: range


def shares_of(splits: int, own: int, rows: int, group: int, half: int) -> Iterator[Share]:
    """What the CTA of split `own` merges, of `rows` query rows, in one half of the columns."""
    begin, left = group * ROW_TILE, half * HALF_COLUMNS
    end = min(begin + ROW_TILE, rows)
    if splits <= FEW:
        for row in range(begin + own * FEW_ROWS, end, splits * FEW_ROWS):
            yield Share(range(row, min(row + FEW_ROWS, end)), range(left, left + HALF_COLUMNS))
    else:
        for item in range(begin * 2 + own, end * 2, splits):
            column = left + item % 2 * (HALF_COLUMNS // 2)
            yield Share(range(item // 2, item // 2 + 1), range(column, column + HALF_COLUMNS // 2))


def merge_together(
    plan: DecodePlan, counters: list[int], out: Tensor, found: tuple[Tensor, Tensor], choose: Callable[[int], int]
) -> None:
    """One launch: `found` is what the decode leaves in partial [2 · parts, rows, 512] and lse [2 · parts, rows]; each half of a
    CTA writes its part of them, counts, waits, and merges its shares into out [N, rows, 512], inert sequences included.
    choose(n): which of n that can go on does. Raises RuntimeError if none can and some have not ended."""
    partial = torch.full_like(found[0], math.nan)
    # Once a half: each waits for the partition that writes it.
    sums = [torch.full_like(found[1], math.nan) for _ in range(2)]
    rows, groups = out.shape[1], -(-out.shape[1] // ROW_TILE)
    own: list[list[Piece]] = [[] for _ in range(plan.parts)]
    for piece in pieces(plan):
        own[piece.part].append(piece)
    halves = [
        _half(plan, counters, out, found, (partial, sums[half]), part, own[part], rows, group, half)
        for part in range(plan.parts)
        for group in range(groups)
        for half in range(2)
    ]
    waiting = [(half, next(half, None)) for half in halves]
    while waiting := [pair for pair in waiting if pair[1] is not None]:
        able = [i for i, (_, ready) in enumerate(waiting) if ready is not None and ready()]
        if not able:
            raise RuntimeError(f"{len(waiting)} halves wait for each other")
        i = able[choose(len(able))]
        waiting[i] = (waiting[i][0], next(waiting[i][0], None))


def _reached(counters: list[int], cell: int, wanted: int) -> bool:
    return counters[cell] >= wanted


def _half(
    plan: DecodePlan, counters: list[int], out: Tensor, found: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], part: int,
    own: list[Piece], rows: int, group: int, half: int,
) -> Iterator[Callable[[], bool]]:  # fmt: skip
    """Yields, before every step that others may see, whether it can be taken."""
    lengths, spans, groups = plan.lengths.tolist(), plan.spans.tolist(), -(-rows // ROW_TILE)
    row, column = slice(group * ROW_TILE, (group + 1) * ROW_TILE), slice(half * HALF_COLUMNS, (half + 1) * HALF_COLUMNS)
    for sequence in range(part, len(lengths), plan.parts):
        if not lengths[sequence]:
            out[sequence, row, column] = 0
    begin, end = plan.records[part, :2].tolist()
    before: dict[int, int] = {}
    for piece in own:
        yield lambda: True
        if piece.last - piece.first < -(-lengths[piece.sequence] // PAGE):
            ours[0][piece.slot, row, column] = found[0][piece.slot, row, column]
            ours[1][piece.slot, row] = found[1][piece.slot, row]
            yield lambda: True
            cell = (piece.sequence * groups + group) * 2 + half
            before[piece.sequence] = counters[cell]
            counters[cell] += 1
    for sequence in (begin, end - 1)[: max(0, end - begin)]:
        first, last = spans[sequence]
        splits = last - first + 1
        if splits < 2:
            continue
        cell = (sequence * groups + group) * 2 + half
        wanted = (before[sequence] // splits + 1) * splits
        yield bound(_reached, counters, cell, wanted)
        slots = torch.tensor([2 * p + (p == first) for p in range(first, last + 1)])
        for share in shares_of(splits, part - first, rows, group, half):
            r, c = torch.tensor(list(share.rows)), torch.tensor(list(share.columns))
            known = ours[1][slots][:, r]
            weights = torch.softmax(known * math.log(2), 0).where(known.amax(0) > -math.inf, 0.0)
            out[sequence, r[:, None], c] = (weights[..., None] * ours[0][slots][:, r][..., c]).sum(0)
            yield lambda: True
