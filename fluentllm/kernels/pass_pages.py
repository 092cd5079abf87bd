"""Pages of a pass's sequences side by side, as MLA expands them: found on the device, from lengths that stand there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PassPages:
    """E pages, sequence by sequence. Behind the last sequence's there may be some that are nobody's."""

    first: Tensor
    """[N] int64, where each sequence's pages begin."""
    owner: Tensor
    """[E] int64, the sequence of each; of those that are nobody's, any."""
    column: Tensor
    """[E] int64, which of its sequence's pages it is."""
    table: Tensor
    """[N, W] int32, where each sequence's pages stand; behind its last, any."""


def pages_of_pass(kv_lengths: Tensor, page_size: int, count: int, width: int) -> PassPages:
    """kv_lengths [N] int32, keys of each sequence; `count` pages, at least as many as they fill; `width`: most pages of one."""
    pages = (kv_lengths + (page_size - 1)) // page_size
    ends = pages.cumsum(0)
    first = ends - pages
    place = torch.arange(count, device=pages.device)
    owner = torch.searchsorted(ends, place, right=True).clamp_(max=pages.shape[0] - 1)
    column = (place - first[owner]).clamp_(0, width - 1)
    columns = torch.arange(min(count, width), device=pages.device)
    table = (first.unsqueeze(1) + columns).clamp_(max=count - 1)
    return PassPages(first, owner, column, table.to(torch.int32))
