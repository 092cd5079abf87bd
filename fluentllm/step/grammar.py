"""Token masks of grammars at every verified position, and the state that a slot is in afterwards. Nothing leaves the device.

Grammars are tables, (state, token) → state, or have a matcher on the host that has left its masks in the slot tables."""

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


def forbid_masked(logits: Tensor, slots: Tensor, rows: int, tables: SlotTables) -> None:
    """The same by the masks that the host has given: logits [B × rows, V] float32; slots [B]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = tables.token_masks[slots, :rows].unsqueeze(-1) >> shifts & 1
    logits.masked_fill_(bits.flatten(2)[:, :, : tables.vocab_size].reshape(logits.shape) == 0, float("-inf"))


def drop_unmasked(slots: Tensor, tables: SlotTables) -> None:
    """Let only those drafts count behind which there is a mask to draw with. slots [B]."""
    tables.drafted[slots] = torch.minimum(tables.drafted[slots], tables.masked[slots] - 1)


def forbid_drafts(logits: Tensor, state: Tensor, tables: SlotTables) -> None:
    """One draft of each of B slots: set what their tables forbid in `state` [B] int64 to -inf in logits [B, V], in place."""
    logits.masked_fill_(tables.grammar_next[state] < 0, float("-inf"))


def after(state: Tensor, token: Tensor, tables: SlotTables) -> Tensor:
    """state, token [B] int64 → the states behind it, [B]; behind a forbidden token any will do."""
    return tables.grammar_next[state, token].to(torch.int64).clamp(min=0)


def allowed_drafts(drafts: Tensor, valid: Tensor, slots: Tensor, tables: SlotTables) -> Tensor:
    """drafts [B, K] int64, of which the first `valid` [B] count, of slots [B] → how many come before the first that the slot's
    table forbids: that one and all behind it are wrong."""
    states = _walk(tables.grammar_state[slots], drafts, tables)[:, :-1]
    allowed = tables.grammar_next[states, drafts.clamp(0, tables.vocab_size - 1)] >= 0
    return torch.minimum(valid, allowed.to(torch.int64).cumprod(1).sum(1))


def advance(drawn: Tensor, counts: Tensor, slots: Tensor, tables: SlotTables) -> None:
    """Move the slots [B] on by the first `counts` [B] of drawn [B, q] int64, what they got."""
    states = _walk(tables.grammar_state[slots], drawn, tables)
    tables.grammar_state[slots] = states.gather(1, counts.unsqueeze(1)).squeeze(1)


def _walk(state: Tensor, tokens: Tensor, tables: SlotTables) -> Tensor:
    """state [B] int64, tokens [B, n] int64 → [B, n + 1], the states before and after each. Behind a forbidden token, which can
    only be a wrong draft, any state will do."""
    states = [state]
    for token in tokens.unbind(1):
        states.append(after(states[-1], token.clamp(0, tables.vocab_size - 1), tables))
    return torch.stack(states, 1)
