"""The proposer of `spec_pld`: stateless, the slots' histories are all it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.protocols import DraftReads
from ...kernels import in_kernels
from ...kernels.prompt_lookup import prompt_lookup_on_host

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.batch import Batch
    from ...core.slots import SlotTables


class PromptLookup:
    """Implements `core.protocols.MovableProposer` and `CountedProposer`."""

    reads = DraftReads()

    def __init__(self, tables: SlotTables, shortest: int, longest: int) -> None:
        self._tables = tables
        self._sizes = shortest, longest

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._look_up(slots, count)

    def _look_up(self, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if not count:
            return slots.new_empty(len(slots), 0), slots.new_zeros(len(slots))
        if in_kernels(slots):
            from ...kernels.triton.prompt_lookup import prompt_lookup

            return prompt_lookup(tables.history, slots, tables.length, count, *self._sizes)
        return prompt_lookup_on_host(tables.history, slots, tables.length[slots], count, *self._sizes)

    @property
    def page_states(self) -> tuple[Tensor, ...]:
        return ()

    def resume(self, batch: Batch, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._look_up(slots, count)
