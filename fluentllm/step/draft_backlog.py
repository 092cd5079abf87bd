"""Rows that a draft layer has yet to compute: while a CPU drafts nothing they wait, and a step takes as long as without.

The host may read a CPU's tensors, so it keeps for each slot the target's rows that the layer has not seen. They are computed
together before the slot's next drafts, and where a page ends: a page that is published has the layer's KV too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.slots import SlotTables

Row = tuple[int, "Tensor", list["Tensor"], int]
"""Position, the pass's hidden states and layer inputs, and its row in these."""


class Backlog:
    """The target's rows that wait, for each slot in order of position; at most a page of them."""

    def __init__(self, tables: SlotTables) -> None:
        self._tables = tables
        self._waiting: dict[int, list[Row]] = {}

    def add(self, batch: Batch, hidden: Tensor) -> list[int]:
        """A decode pass of one row a slot → slots that end a page with it, whose rows must wait no longer."""
        due, size = [], batch.page_size
        columns = batch.slots.tolist(), batch.positions.tolist(), batch.kv_rows.tolist()
        for row, (slot, position, kv_row) in enumerate(zip(*columns, strict=True)):
            if kv_row < size:
                continue  # had finished before
            self._waiting.setdefault(slot, []).append((position, hidden, batch.layer_inputs, row))
            if (position + 1) % size == 0:
                due.append(slot)
        return due

    def drop(self, slots: list[int]) -> None:
        """Other requests are in these from here on."""
        for slot in slots:
            self._waiting.pop(slot, None)

    def take(self, slots: list[int]) -> tuple[Batch, Tensor] | None:
        """What waits of these slots, as a decode pass of one row a sequence, and its hidden states; None: nothing does."""
        if not self._waiting:
            return None
        named = [(slot, row) for slot in slots for row in self._waiting.pop(slot, ())]
        if not named:
            return None
        tables, count = self._tables, len(named)
        of = torch.tensor([slot for slot, _ in named])
        positions = torch.tensor([position for _, (position, *_) in named])
        page_table = tables.page_table[of]
        pages = page_table.gather(1, (positions // tables.page_size).unsqueeze(1)).squeeze(1).to(torch.int64)
        inputs = len(named[0][1][2])
        batch = Batch(
            tokens=tables.history[of, positions].to(torch.int64),
            positions=positions,
            sequences=torch.arange(count),
            slots=of,
            query_start=torch.arange(count + 1, dtype=torch.int32),
            kv_lengths=(positions + 1).to(torch.int32),
            page_table=page_table,
            kv_rows=pages * tables.page_size + positions % tables.page_size,
            history=tables.history,
            page_size=tables.page_size,
            query_length=1,
            query_lengths=None,
            layer_inputs=[torch.stack([row[2][i][row[3]] for _, row in named]) for i in range(inputs)],
        )
        return batch, torch.stack([row[1][row[3]] for _, row in named])
