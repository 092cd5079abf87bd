"""A prefill pass with its rows padded to a bucket, in tensors that stay where they are: through the target's layers it is one
launch then.

Launching a pass kernel by kernel takes the host 10 to 35 ms, which is more than the device needs for the few thousand tokens
that a step has beside decodes. What differs from pass to pass is uploaded in front of the graph: a column a chunk, and what
the attention backend plans from lengths.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..core.batch import Batch
from ..core.buckets import CAPTURED_TOKENS, pass_rows
from ..core.handoff import watched
from ..core.staging import upload
from ..kernels import in_kernels
from ..kernels.prefill_rows import PrefillRows, prefill_rows_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..core.graphs import Graphs
    from ..core.handoff import PassWatcher
    from ..core.protocols import Model, PlannedPrefill
    from ..core.slots import SlotTables
    from ..core.types import PrefillChunk, StepPlan


class PaddedPrefill:
    """What prefill passes do through the target's layers."""

    def __init__(
        self,
        model: Model,
        attention: PlannedPrefill,
        tables: SlotTables,
        graphs: Graphs[Any] | None,
        watcher: PassWatcher | None = None,
    ) -> None:
        """graphs: None for passes that are launched kernel by kernel, and compute the same. watcher: follows them layer by
        layer; a graph ends behind each layer's KV then."""
        self._model, self._tables, self._graphs = model, tables, graphs
        if watcher is not None:
            attention = watched(attention, _Cutting(watcher, graphs) if graphs is not None else watcher)
        self._attention = attention
        # A sequence more than there are slots: the padding's.
        self._rows = PrefillRows.create(tables.slots + 1, CAPTURED_TOKENS, tables.device)
        self._slots = self._rows.given[0]
        self._page_table = torch.zeros(tables.slots + 1, tables.max_pages, dtype=torch.int32, device=tables.device)
        self._kept: list[Tensor] = []
        """[CAPTURED_TOKENS, width]: the pass's hidden states, then the inputs of layers that were asked for. The next pass
        overwrites them."""

    def run(self, chunks: list[PrefillChunk], *, eager: bool = False) -> tuple[Batch, Tensor] | None:
        """The chunks' batch and hidden states [T, hidden], as the model computes them of a pass without padding; None: nothing
        has been done, for this pass cannot be padded. eager: without its graph."""
        padded = self.prepared(chunks)
        if padded is None:
            return None
        rows, count = padded.tokens.shape[0], sum(chunk.count for chunk in chunks)
        if self._graphs is None or eager:
            self._forward(padded)
        else:
            self._graphs.run(("prefill", rows, padded.plan.key), partial(self._forward, padded))
        batch = self._batch(chunks, len(chunks), count)
        hidden, *batch.layer_inputs = (tensor[:count] for tensor in self._kept)
        return batch, hidden

    def prepared(self, chunks: list[PrefillChunk]) -> Batch | None:
        """The pass with its padding, planned, in tensors that the next one overwrites; None: it cannot be padded."""
        count = sum(chunk.count for chunk in chunks)
        if count > CAPTURED_TOKENS:
            return None
        rows = pass_rows(count)
        padded = self._batch(chunks, self._tables.slots + 1, rows)
        padded.plan = self._attention.plan_prefill(padded)
        if padded.plan is None:
            return None
        self._upload(chunks, count, rows)
        return padded

    def _upload(self, chunks: list[PrefillChunk], count: int, rows: int) -> None:
        tables, given = self._tables, self._rows.given
        rest = given.shape[1] - len(chunks) - 1
        firsts = accumulate((chunk.count for chunk in chunks), initial=0)
        columns = [
            *((c.slot, c.start, first, c.start + c.count) for c, first in zip(chunks, firsts, strict=False)),
            (tables.padding_slot, 0, count, 0),
            *[(tables.padding_slot, 0, CAPTURED_TOKENS, 0)] * rest,
        ]
        lines = [value for line in zip(*columns, strict=True) for value in line]
        given.copy_(upload(lines, torch.int64, tables.device).view_as(given))
        fill: Callable[..., None] = prefill_rows_reference
        if in_kernels(given):
            from ..kernels.triton.prefill_rows import prefill_rows as fill
        fill(self._rows, count, rows, tables.history, tables.page_table, tables.page_size)
        present = len(chunks) + 1
        torch.index_select(tables.page_table, 0, self._slots[:present], out=self._page_table[:present])

    def _batch(self, chunks: list[PrefillChunk], sequences: int, rows: int) -> Batch:
        """Of the first rows and sequences that stand in the tensors."""
        made = self._rows
        return Batch(
            tokens=made.tokens[:rows],
            positions=made.positions[:rows],
            sequences=made.sequences[:rows],
            slots=self._slots[:sequences],
            query_start=made.query_start[: sequences + 1],
            kv_lengths=made.kv_lengths[:sequences],
            page_table=self._page_table[:sequences],
            kv_rows=made.kv_rows[:rows],
            history=self._tables.history,
            page_size=self._tables.page_size,
            query_length=None,
            query_lengths=tuple(chunk.count for chunk in chunks),
            kv_lengths_host=tuple(chunk.start + chunk.count for chunk in chunks),
        )

    def _forward(self, padded: Batch) -> None:
        """What a graph holds."""
        found = [self._model.forward(padded, self._attention), *padded.layer_inputs]
        if not self._kept:
            self._kept = [tensor.new_empty(CAPTURED_TOKENS, tensor.shape[1]) for tensor in found]
        for kept, tensor in zip(self._kept, found, strict=True):
            kept[: tensor.shape[0]].copy_(tensor)


class _Cutting:
    """A `PassWatcher` that hears of a layer between two graphs."""

    def __init__(self, watcher: PassWatcher, graphs: Graphs[Any]) -> None:
        self._watcher, self._graphs = watcher, graphs

    def begin(self, plan: StepPlan) -> None:
        self._watcher.begin(plan)

    def layer(self, layer: int) -> None:
        self._graphs.cut(partial(self._watcher.layer, layer))

    def end(self) -> None:
        self._watcher.end()
