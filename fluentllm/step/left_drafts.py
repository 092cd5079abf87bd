"""Drafts on their way to the host: for matchers of grammars, which must see them before they are verified, and for looks
(`core.draft_looks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.staging import to_host, upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.executor import Pending, SlotRows
    from ..core.slots import SlotTables
    from ..core.types import SlotResult


class LeftDrafts:
    """What a step's programs, enqueued before, leave in some slots for the next step to verify."""

    def __init__(self, slots: list[int], count: int, tables: SlotTables) -> None:
        """`count`: drafts that the step leaves."""
        rows = upload(slots, torch.int64, tables.device)
        places = tables.length[rows].unsqueeze(1) + torch.arange(count, device=tables.device)
        drafts = tables.history[rows.unsqueeze(1), places].to(torch.int64)
        self._slots = slots
        self._found = to_host(torch.cat((drafts, tables.drafted[rows].unsqueeze(1)), 1))
        """[slots, count + 1]: drafts, then how many of them count."""

    def by_slot(self) -> dict[int, list[int]]:
        """Once the step has finished."""
        return {slot: drafts[:valid] for slot, (*drafts, valid) in zip(self._slots, self._found.tolist(), strict=True)}


def with_drafts(pending: Sequence[Pending], left: LeftDrafts) -> list[Pending]:
    """The same results, with the drafts of the slots in `left`."""
    return [_WithDrafts(program, left) for program in pending]


class _WithDrafts:
    def __init__(self, pending: Pending, left: LeftDrafts) -> None:
        self._pending, self._left = pending, left

    def read(self, rows: SlotRows) -> list[SlotResult]:
        drafts = self._left.by_slot()
        results = self._pending.read(rows)
        for result in results:
            result.drafts = drafts.get(result.slot, [])
        return results
