"""Acceptance at will, for benchmarks on random weights: drafts count as right by a coin, not by the target's own tokens.

An accepted draft becomes the token, since the rows behind it were computed with it: positions, KV and history fit together
as they do in earnest, and only the answer means nothing. The coin depends on seed and position alone, so a run repeats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.slots import SlotTables
from ..kernels.sampling import gumbel_noise

_OTHER_STREAM = 0x5EED << 32
"""Added to the seeds: the coins must not be the noise that tokens are drawn with."""


def share_for(mean_length: float, drafts: int) -> float:
    """The share a of drafts to accept, each if all before it were, so that Σ_{j = 0 … drafts} a^j = `mean_length`: the mean
    tokens a step, the target's own included. 1 ≤ mean_length ≤ drafts + 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(drafts + 1)) < mean_length else (low, middle)
    return high


def accept_at_random(
    drawn: Tensor, drafts: Tensor, positions: Tensor, slots: Tensor, tables: SlotTables, share: float
) -> tuple[Tensor, Tensor]:
    """drawn [B, q] int64, drafts [B, q - 1], positions [B, q] where they stand → the tokens [B, q], drafts in place of what
    was drawn where they are accepted, and whether they are, [B, q - 1] bool."""
    rows = drawn.shape[1]
    seeds = (tables.seed[slots] + _OTHER_STREAM).repeat_interleave(rows - 1)
    noise = gumbel_noise(seeds, positions[:, :-1].reshape(-1), 1).view(-1, rows - 1)
    # P(G < x) = exp(-exp(-x)) for standard Gumbel noise G.
    threshold = math.inf if share >= 1 else -math.inf if share <= 0 else -math.log(-math.log(share))
    offsets = torch.arange(rows - 1, device=drawn.device)
    accepted = (noise < threshold) & (offsets < tables.drafted[slots].unsqueeze(1))
    accepted = accepted.to(torch.int64).cumprod(1).bool()
    return torch.cat((torch.where(accepted, drafts, drawn[:, :-1]), drawn[:, -1:]), 1), accepted
