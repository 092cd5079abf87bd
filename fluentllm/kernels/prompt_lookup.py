"""Prompt lookup: find the end of a history earlier in the same history, and take what followed as drafts.

The idea is Saxena's "Prompt Lookup Decoding" (2023). On the device, over the slots' own token histories: nothing is uploaded,
and the cost is `longest` compares of the history's width. On a CPU the histories are searched in place: there, for one
sequence, a torch operation takes longer than all of the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def prompt_lookup(history: Tensor, lengths: Tensor, count: int, shortest: int, longest: int) -> tuple[Tensor, Tensor]:
    """history [B, L] int32, of which lengths [B] int64 tokens count → drafts [B, count] int64, valid [B] int64 (0 or count).

    Among earlier places where the last n tokens stand, shortest ≤ n ≤ longest, takes one with the largest n, of these the
    latest. What follows a place closer than `count` to the end repeats from the place on.
    """
    batch, width = history.shape
    device = history.device
    ends = torch.arange(width, device=device)
    # matched[b, e]: how many of the last tokens stand right before e, up to `longest`.
    matched = torch.zeros(batch, width, dtype=torch.int64, device=device)
    unbroken = (ends > 0) & (ends < lengths.unsqueeze(1))
    for i in range(longest):
        wanted = history.gather(1, (lengths - 1 - i).clamp(min=0).unsqueeze(1))
        same = torch.zeros_like(unbroken)
        same[:, i + 1 :] = history[:, : width - i - 1] == wanted
        # A match needs i + 1 tokens before e, and a place of its own before the end.
        unbroken = unbroken & same & (lengths > i + 1).unsqueeze(1)
        matched += unbroken
    score = torch.where(matched >= shortest, matched * width + ends, -1)
    best, place = score.max(1)
    valid = (best >= 0).to(torch.int64) * count
    period = (lengths - place).clamp(min=1).unsqueeze(1)
    index = place.unsqueeze(1) + torch.arange(count, device=device) % period
    return history.gather(1, index).to(torch.int64), valid


def prompt_lookup_on_host(
    histories: Tensor, slots: Tensor, lengths: Tensor, count: int, shortest: int, longest: int
) -> tuple[Tensor, Tensor]:
    """The same for rows `slots` [B] int64 of histories [S, L] int32 in the host's memory, of which lengths [B] tokens count.
    Drafts that are not valid are 0."""
    rows = histories.numpy()
    drafts, valid = torch.zeros(len(slots), count, dtype=torch.int64), torch.zeros(len(slots), dtype=torch.int64)
    for index, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        tokens = rows[slot, :length]
        end = _latest_of_the_longest(tokens, shortest, longest)
        if end:
            drafts.numpy()[index] = tokens[end + np.arange(count) % (length - end)]
            valid[index] = count
    return drafts, valid


def _latest_of_the_longest(tokens: NDArray[np.int32], shortest: int, longest: int) -> int:
    """Where what the last tokens say stood before, and ended; 0: nowhere."""
    ends, matched = np.flatnonzero(tokens[:-1] == tokens[-1:]) + 1, 1
    while ends.size and matched < longest:
        longer = ends[ends > matched]
        longer = longer[tokens[longer - matched - 1] == tokens[len(tokens) - matched - 1]]
        if not longer.size:
            break
        ends, matched = longer, matched + 1
    return int(ends[-1]) if ends.size and matched >= shortest else 0


def prompt_lookup_reference(tokens: list[int], count: int, shortest: int, longest: int) -> list[int]:
    """The same for one history, as one would say it; [] where nothing is found."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                period = len(tokens) - end
                return [tokens[end + j % period] for j in range(count)]
    return []
