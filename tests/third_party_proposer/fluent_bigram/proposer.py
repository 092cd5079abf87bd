"""The proposer: a table of the token that followed each token last, on the device.

Everything is a tensor operation of a fixed shape, without a value that the host would have to wait for, so that a GPU can
capture it as part of the step program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fluentllm.core.batch import Batch
    from fluentllm.core.slots import SlotTables


class BigramProposer:
    """Implements `fluentllm.core.protocols.Proposer`."""

    def __init__(self, tables: SlotTables, least: int) -> None:
        """least: how often in a row a pair must have come."""
        self._tables = tables
        self._least = least
        # One row more than tokens: it takes what is not to be learned.
        self._follower = torch.zeros(tables.vocab_size + 1, dtype=torch.int64, device=tables.device)
        self._times = torch.zeros_like(self._follower)
        """How often in a row `_follower` has come; 0: nothing was seen yet."""

    def draft(self, batch: Batch, hidden: torch.Tensor, slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [T, hidden] is not looked at; slots [B] → drafts [B, count], and how many of each row are worth verifying [B],
        both int64."""
        self._learn(batch)
        tables = self._tables
        token = tables.history[slots, tables.length[slots] - 1].to(torch.int64)
        known = torch.ones_like(token, dtype=torch.bool)
        drafts = token.new_empty(len(slots), count)
        valid = torch.zeros_like(token)
        for place in range(count):
            known = known & (self._times[token] >= self._least)
            token = self._follower[token]
            drafts[:, place] = token
            valid += known
        return drafts, valid

    def _learn(self, batch: Batch) -> None:
        """The pairs of this pass's rows with what came after them, where that is a token by now and no refused draft."""
        tables = self._tables
        slots = batch.slots[batch.sequences]
        there = batch.positions + 1 < tables.length[slots]
        token = torch.where(there, tables.history[slots, batch.positions].to(torch.int64), tables.vocab_size)
        # A row at the end of the longest history has nothing behind it to look at.
        behind = (batch.positions + 1).clamp(max=tables.history.shape[1] - 1)
        follower = torch.where(there, tables.history[slots, behind].to(torch.int64), 0)
        times = torch.where(self._follower[token] == follower, self._times[token] + 1, 1)
        self._follower.index_copy_(0, token, follower)
        self._times.index_copy_(0, token, times)
        self._times[-1:].zero_()
