"""The proposer of `spec_mtp`: one draft layer, applied to the target's rows and then to its own output, once a draft.

After each pass of the target the layer runs over all of its rows with the target's hidden states, so that its KV is that of
the true tokens wherever drafts had been written; its last row of each slot gives the first draft, and each further draft is
made from the layer's own output and the draft before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...core.errors import ConfigError
from ...step.processors import process_logits
from ...step.sample import draw
from .rows import next_rows, shifted, shifted_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.batch import Batch
    from ...core.protocols import ProposerContext
    from ...layers.mtp import MTP


class MTPProposer:
    """Implements `core.protocols.Proposer`."""

    def __init__(self, context: ProposerContext) -> None:
        mtp: MTP | None = getattr(context.model, "mtp", None)
        if mtp is None:
            raise ConfigError(
                f"speculative.method is mtp, but this {context.model.spec.architecture} has no MTP layer.",
                fix="Use speculative.method=pld, or none.",
                param="speculative.method",
            )
        self._mtp = mtp
        self._tables = context.tables
        self._attention = context.attention
        shape = context.pages + 1, context.model.spec.hidden_size
        self._page_hidden = torch.zeros(shape, dtype=getattr(torch, context.dtype), device=context.tables.device)
        """The target's hidden state at the last position of each page, so that a prefix hit can draft at once; of a page that a
        prompt ends in, at the prompt's last position, for an engine that goes on with it."""

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        self._keep_page_ends(batch, hidden)
        if batch.query_length is None:
            rows, states = shifted_chunks(batch, self._page_hidden, hidden)
        else:
            rows, states = shifted(batch, self._tables), hidden
        wanted = self._newest_rows(batch, rows, slots) if count else slots[:0]
        state = self._mtp.forward(states, rows, self._attention, wanted)
        if not wanted.shape[0]:
            return slots.new_empty(slots.shape[0], count), slots.new_zeros(slots.shape[0])
        drafts = self._chain(state, slots, self._tables.page_table[slots], rows, count)
        return drafts, torch.full_like(slots, count)

    @property
    def page_states(self) -> tuple[Tensor, ...]:
        return (self._page_hidden,)

    def resume(self, batch: Batch, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self.draft(batch, self._page_hidden[batch.kv_rows // batch.page_size], slots, count)

    def _keep_page_ends(self, batch: Batch, hidden: Tensor) -> None:
        """Those of wrong drafts are written too, and again when the position is; inert rows write to page 0."""
        ends = (batch.positions + 1) % batch.page_size == 0
        if batch.query_length is None:
            ends[batch.query_start[1:].to(torch.int64) - 1] = True
        pages = (batch.kv_rows // batch.page_size).where(ends, 0)
        self._page_hidden[pages] = hidden

    def _newest_rows(self, batch: Batch, rows: Batch, slots: Tensor) -> Tensor:
        """[B]: for each of the slots the row of its newest token."""
        if batch.query_length is None:
            sequence = (batch.slots.unsqueeze(0) == slots.unsqueeze(1)).to(torch.int64).argmax(1)
            return rows.query_start[sequence + 1].to(torch.int64) - 1
        first = rows.query_start[:-1].to(torch.int64)
        # Nothing was added to slots that had finished before: any row will do.
        return first + (self._tables.length[slots] - 1 - rows.positions[first]).clamp(min=0)

    def _chain(self, state: Tensor, slots: Tensor, page_table: Tensor, rows: Batch, count: int) -> Tensor:
        """state [B, hidden]: the layer's output at the newest token → drafts [B, count].

        A draft is drawn as the target draws its token, with the same noise: where both agree on the logits, they agree on
        the token.
        """
        tables = self._tables
        none = slots.new_empty(slots.shape[0], 0)
        position = tables.length[slots]
        drafts: list[Tensor] = []
        while True:
            logits = process_logits(self._mtp.logits(state), slots, position, none, tables, rows.features)
            drafts.append(draw(logits, slots, position, tables, rows.features))
            if len(drafts) == count:
                return torch.stack(drafts, 1)
            row = next_rows(slots, drafts[-1], position, page_table, tables, rows)
            state = self._mtp.forward(state, row, self._attention)
            position = position + 1
