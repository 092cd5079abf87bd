"""Verify drafts against drawn tokens, and write what is accepted into the slot tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.slots import SlotTables
from ..core.types import Feature
from ..kernels import in_kernels

RUNNING, STOPPED, OUT_OF_BUDGET = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Committed:
    """What B slots got in one step, in one tensor, so that one copy brings it to the host."""

    packed: Tensor
    """[B, q + 4] int64: tokens, then count, state, drafted, accepted."""

    @property
    def tokens(self) -> Tensor:
        """[B, q]; the first `counts` of each row are new."""
        return self.packed[:, :-4]

    @property
    def counts(self) -> Tensor:
        """[B], 0 for a slot that had finished before."""
        return self.packed[:, -4]

    @property
    def states(self) -> Tensor:
        """[B], RUNNING, STOPPED or OUT_OF_BUDGET."""
        return self.packed[:, -3]

    @property
    def drafted(self) -> Tensor:
        """[B], drafts that were verified."""
        return self.packed[:, -2]

    @property
    def accepted(self) -> Tensor:
        """[B], drafts that became tokens."""
        return self.packed[:, -1]


def commit(
    drawn: Tensor, drafts: Tensor, slots: Tensor, tables: SlotTables, features: int, equal: Tensor | None = None
) -> Committed:
    """As `commit_reference`, of which this is one launch on a GPU."""
    if in_kernels(drawn):
        from ..kernels.triton.commit import commit_tokens

        counts = tables.output_counts if features & Feature.PENALTIES else None
        return Committed(
            commit_tokens(
                drawn, drafts, slots, tables.length, tables.end, tables.drafted, tables.finished, tables.stop_ids,
                tables.history, counts, equal,
            )
        )  # fmt: skip
    return commit_reference(drawn, drafts, slots, tables, features, equal)


def commit_reference(
    drawn: Tensor, drafts: Tensor, slots: Tensor, tables: SlotTables, features: int, equal: Tensor | None = None
) -> Committed:
    """drawn [B, q] int64, the target's own token at each of q = K + 1 positions; drafts [B, K] int64; slots [B] int64.

    Draft j is accepted if it is the token drawn at its position and all before it were; the first token that differs is
    the target's own. Of a slot's K drafts the first `tables.drafted` count. The new tokens end at the first stop id and at
    the budget. `equal` [B, K] bool says which drafts are right, if another rule than equality is to hold.
    """
    rows = drawn.shape[1]
    offsets = torch.arange(rows, device=drawn.device)
    live = ~tables.finished[slots]
    length = tables.length[slots]

    drafted = tables.drafted[slots].clamp(max=rows - 1)
    equal = drawn[:, :-1] == drafts if equal is None else equal
    right = (equal & (offsets[:-1] < drafted.unsqueeze(1))).to(torch.int64).cumprod(1).sum(1)
    # Rows with `offsets` ≤ right are new, unless something ends the request before.
    is_stop = (drawn.unsqueeze(2) == tables.stop_ids[slots].unsqueeze(1)).any(2)
    before_stop = (is_stop.to(torch.int64).cumsum(1) - is_stop.to(torch.int64)) == 0
    room = (tables.end[slots] - length).unsqueeze(1)
    new = (offsets <= right.unsqueeze(1)) & before_stop & (offsets < room) & live.unsqueeze(1)
    counts = new.sum(1)

    stopped = (new & is_stop).any(1)
    full = live & (length + counts >= tables.end[slots]) & ~stopped
    states = stopped.to(torch.int64) * STOPPED + full.to(torch.int64) * OUT_OF_BUDGET

    _append(drawn, new, length, slots, tables, features)
    tables.length[slots] = length + counts
    tables.finished[slots] |= stopped | full
    tables.drafted[slots] = 0
    accepted = torch.minimum(right, (counts - 1).clamp(min=0))
    return Committed(torch.cat((drawn, torch.stack((counts, states, drafted * live, accepted), 1)), 1))


def _append(drawn: Tensor, new: Tensor, length: Tensor, slots: Tensor, tables: SlotTables, features: int) -> None:
    """Write the new tokens into history and counts; rows that are not new go to the padding slot."""
    rows = drawn.shape[1]
    target = slots.unsqueeze(1).where(new, tables.padding_slot)
    index = (length.unsqueeze(1) + torch.arange(rows, device=drawn.device)).where(new, 0)
    tables.history[target, index] = drawn.to(torch.int32)
    if features & Feature.PENALTIES:
        one = torch.ones((), dtype=torch.int32, device=drawn.device).expand(drawn.shape)
        tables.output_counts.index_put_((target, drawn), one, accumulate=True)


def leave_drafts(drafts: Tensor, valid: Tensor, slots: Tensor, tables: SlotTables) -> None:
    """As `leave_drafts_reference`, of which this is one launch on a GPU."""
    if not in_kernels(drafts):
        leave_drafts_reference(drafts, valid, slots, tables)
        return
    from ..kernels.triton.commit import leave_drafts as launch

    drafts, valid = drafts.contiguous(), valid.contiguous()
    launch(drafts, valid, slots, tables.length, tables.drafted, tables.history, tables.vocab_size)


def leave_drafts_reference(drafts: Tensor, valid: Tensor, slots: Tensor, tables: SlotTables) -> None:
    """Write drafts [B, K] int64, of which the first `valid` [B] count, behind the slots' histories for the next step.

    Ids outside the vocabulary would be read outside the embedding: they become ids inside it, which are wrong drafts.
    """
    drafts = drafts.clamp(0, tables.vocab_size - 1)
    index = tables.length[slots].unsqueeze(1) + torch.arange(drafts.shape[1], device=drafts.device)
    tables.history[slots.unsqueeze(1), index] = drafts.to(torch.int32)
    tables.drafted[slots] = valid.clamp(0, drafts.shape[1])
