"""Token masks of grammars at every verified position, and the state that a slot is in afterwards. Nothing leaves the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.slots import SlotTables


def forbid_tokens(logits: Tensor, slots: Tensor, drafts: Tensor, tables: SlotTables) -> None:
    """Set what the grammar forbids to -inf, in place. logits [B × q, V] float32; slots [B]; drafts [B, q - 1] int64: row j is
    in the state after the drafts before it."""
    states = _walk(tables.grammar_state[slots], drafts, tables)
    logits.masked_fill_(tables.grammar_next[states.view(-1)] < 0, float("-inf"))


def advance(drawn: Tensor, counts: Tensor, slots: Tensor, tables: SlotTables) -> None:
    """Move the slots [B] on by the first `counts` [B] of drawn [B, q] int64, what they got."""
    states = _walk(tables.grammar_state[slots], drawn, tables)
    tables.grammar_state[slots] = states.gather(1, counts.unsqueeze(1)).squeeze(1)


def _walk(state: Tensor, tokens: Tensor, tables: SlotTables) -> Tensor:
    """state [B] int64, tokens [B, n] int64 → [B, n + 1], the states before and after each. Behind a forbidden token, which can
    only be a wrong draft, any state will do."""
    states = [state]
    for token in tokens.unbind(1):
        states.append(tables.grammar_next[states[-1], token].to(torch.int64).clamp(min=0))
    return torch.stack(states, 1)
