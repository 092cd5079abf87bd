"""A chain of drafts from one layer, applied to the target's rows and then to its own output, once a draft.

What `spec_mtp` and `spec_eagle` share. After each pass of the target the layer runs over all of its rows with the target's
hidden states, so that its KV is that of the true tokens wherever drafts had been written; its last row of each slot gives
the first draft, and each further draft is made from the layer's own output and the draft before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from ..core.types import Feature
from ..kernels.argmax import argmax_rows
from .draft_backlog import Backlog
from .draft_rows import keep_page_ends, next_rows, shifted, shifted_chunks
from .grammar import after, forbid_drafts
from .processors import process_logits
from .sample import draw

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import AttentionBackend, DraftReads, ProposerContext


class DraftLayer(Protocol):
    """The network of a chain. A *state* is what it makes from a position, and from its own output, for the position after."""

    width: int
    """Of a state."""
    first_key: int
    """0: its KV has an entry for a sequence's first token too, made from a state of zeros; 1: it has none."""
    reads: DraftReads
    """For each draft, all that `forward` and `logits` read."""
    vocabulary: Tensor | None
    """[D] int64, increasing: token of each of the D columns of its logits; None: column and token are the same."""

    def target_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        """A pass of the target and its hidden states after the final norm [T, hidden] → [T, width]."""
        ...

    def forward(self, states: Tensor, batch: Batch, attention: AttentionBackend, wanted: Tensor | None = None) -> Tensor:
        """states [T, width], for each row of the batch that of the position before → [T, width], the states at the rows. With
        `wanted` [W] int64 only those rows; KV is written for all."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """[R, width] → [R, D] float32: of the token after each."""
        ...


class ChainProposer:
    """Implements `core.protocols.MovableProposer` with a `DraftLayer`."""

    def __init__(self, context: ProposerContext, layer: DraftLayer) -> None:
        self._layer = layer
        self._tables = context.tables
        self._attention = context.attention
        shape = context.pages + 1, layer.width
        self._page_states = torch.zeros(shape, dtype=getattr(torch, context.dtype), device=context.tables.device)
        """The target's state at the last position of each page, so that a prefix hit can draft at once; of a page that a prompt
        ends in, at the prompt's last position, for an engine that goes on with it."""
        self._backlog = Backlog(self._tables) if self._tables.device.type == "cpu" else None

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self._backlog is not None and self._waits(batch, hidden, count, self._backlog):
            return slots.new_empty(slots.shape[0], count), slots.new_zeros(slots.shape[0])
        return self._draft(batch, self._layer.target_states(batch, hidden), slots, count)

    def _waits(self, batch: Batch, hidden: Tensor, count: int, backlog: Backlog) -> bool:
        """May the layer compute these rows later? What waits and may no longer is computed here."""
        if batch.query_length is None:
            backlog.drop(batch.slots.tolist())
            return False
        waits = count == 0 and batch.query_length == 1
        waiting = backlog.take(backlog.add(batch, hidden) if waits else batch.slots.tolist())
        if waiting is not None:
            rows, states = waiting
            self._draft(rows, self._layer.target_states(rows, states), rows.slots, 0)
        return waits

    @property
    def page_states(self) -> tuple[Tensor, ...]:
        return (self._page_states,)

    @property
    def reads(self) -> DraftReads:
        return self._layer.reads

    def resume(self, batch: Batch, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self._backlog is not None:
            self._backlog.drop(slots.tolist())
        return self._draft(batch, self._page_states[batch.kv_rows // batch.page_size], slots, count)

    def _draft(self, batch: Batch, states: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if batch.query_length is None:
            self._keep_page_ends(batch, states)
            rows, states = shifted_chunks(batch, self._page_states, states)
        else:
            rows, newest = shifted(batch, self._tables, states, self._page_states)
        rows.first_key = self._layer.first_key
        if not (count and slots.shape[0]):
            self._layer.forward(states, rows, self._attention, slots[:0])
            # How many of no drafts count is not looked at, and zeros would be a launch.
            return slots.new_empty(slots.shape[0], count), torch.empty_like(slots)
        if batch.query_length is None:
            newest, page_table = self._ends_of(slots, batch, rows), self._tables.page_table[slots]
        else:
            page_table = batch.page_table
        state = self._layer.forward(states, rows, self._attention, newest)
        return self._chain(state, slots, page_table, rows, count), torch.full_like(slots, count)

    def _keep_page_ends(self, batch: Batch, states: Tensor) -> None:
        """Of a prefill pass, where a chunk's last row counts as an end too."""
        ends = (batch.positions + 1) % batch.page_size == 0
        # By index_fill_, not by assignment, which would bring True from the host and wait for it.
        ends.index_fill_(0, batch.query_start[1:].to(torch.int64) - 1, True)
        keep_page_ends(batch, states, self._page_states, ends)

    def _ends_of(self, slots: Tensor, batch: Batch, rows: Batch) -> Tensor:
        """[B]: for each of the slots of a prefill pass the last of its rows."""
        sequence = (batch.slots.unsqueeze(0) == slots.unsqueeze(1)).to(torch.int64).argmax(1)
        return rows.query_start[sequence + 1].to(torch.int64) - 1

    def _chain(self, state: Tensor, slots: Tensor, page_table: Tensor, rows: Batch, count: int) -> Tensor:
        """state [B, width]: the layer's at the newest token; page_table [B, P]: the slots' → drafts [B, count]."""
        tables, features = self._tables, rows.features
        allowed = tables.grammar_state[slots] if features & Feature.GRAMMAR else None
        drafts: list[Tensor] = []
        for row in next_rows(slots, count, page_table, tables, rows):
            row.tokens = self._draw(self._layer.logits(state), slots, row.positions, allowed, features)
            drafts.append(row.tokens)
            if len(drafts) < count:
                state = self._layer.forward(state, row, self._attention)
                allowed = after(allowed, row.tokens, tables) if allowed is not None else None
        return torch.stack(drafts, 1) if count > 1 else drafts[0].unsqueeze(1)

    def _draw(self, logits: Tensor, slots: Tensor, position: Tensor, allowed: Tensor | None, features: int) -> Tensor:
        """As the target draws its token, with the same noise: where both agree on the logits, they agree on the token.
        allowed [B]: the states of the slots' grammars, None if no request has one."""
        tables, tokens = self._tables, self._layer.vocabulary
        if tokens is not None:
            if not features & ~Feature.LOGPROBS:
                return tokens[argmax_rows(logits)]
            every = logits.new_full((logits.shape[0], tables.vocab_size), float("-inf"))
            logits = every.index_copy_(1, tokens, logits)
        logits = process_logits(logits, slots, position, slots.new_empty(slots.shape[0], 0), tables, features)
        if allowed is not None:
            forbid_drafts(logits, allowed, tables)
        return draw(logits, slots, position, tables, features)
