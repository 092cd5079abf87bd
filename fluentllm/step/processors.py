"""What is done to logits before a token is drawn: penalties, bias, and the ban on stopping too early.

Rows belong to slots; with speculation a slot has several rows, and row j sees the drafts of the rows before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.slots import SlotTables
from ..core.types import Feature


def process_logits(
    logits: Tensor, slots: Tensor, positions: Tensor, drafts: Tensor, tables: SlotTables, features: int
) -> Tensor:
    """[B × q, V] float32 → the same, in place. slots [B × q]; positions [B × q]: where in the history the drawn token will
    stand; drafts [B, q - 1]: the tokens that rows 1 … q-1 take for granted."""
    if features & Feature.PENALTIES:
        apply_penalties(logits, slots, drafts, tables)
    if features & Feature.BIAS:
        logits.scatter_add_(1, tables.bias_ids[slots], tables.bias_values[slots])
    if features & Feature.MIN_TOKENS:
        forbid_early_stop(logits, slots, positions, tables)
    return logits


def apply_penalties(logits: Tensor, slots: Tensor, drafts: Tensor, tables: SlotTables) -> None:
    """Repetition (Keskar et al. 2019, over prompt and output), then frequency and presence (OpenAI's, over output)."""
    counts = tables.output_counts[slots]
    count_drafts(counts, drafts)
    generated = counts > 0
    seen = tables.prompt_seen[slots] | generated
    repetition = torch.where(seen, tables.repetition[slots].unsqueeze(1), 1.0)
    logits.copy_(torch.where(logits > 0, logits / repetition, logits * repetition))
    logits.addcmul_(counts.to(logits.dtype), tables.frequency[slots].unsqueeze(1), value=-1)
    logits.addcmul_(generated.to(logits.dtype), tables.presence[slots].unsqueeze(1), value=-1)


def count_drafts(counts: Tensor, drafts: Tensor) -> None:
    """Add to row (b, j) of counts [B × q, V] the drafts b, 0 … j-1."""
    batch, k = drafts.shape
    rows = counts.view(batch, k + 1, -1)
    one = torch.ones(batch, k, 1, dtype=counts.dtype, device=counts.device)
    for j in range(k):
        rows[:, j + 1 :].scatter_add_(2, drafts[:, j, None, None].expand(-1, k - j, -1), one[:, j:])


def forbid_early_stop(logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotTables) -> None:
    """Set the slots' stop ids to -inf where the token would come before `min_tokens`."""
    stops = tables.stop_ids[slots].to(torch.int64)
    early = (positions < tables.min_end[slots]).unsqueeze(1) & (stops >= 0)
    logits.scatter_add_(1, stops.clamp(min=0), torch.where(early, float("-inf"), 0.0))
