"""MLA prefill in expanded form: the latents of all of a pass's sequences, gathered page by page and multiplied out to heads.

The result has pages of its own, so the prefill kernel for grouped heads reads it as it reads any pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from fluentllm.core.buckets import bucket_of
from fluentllm.kernels.attention_mla import expanded_keys_and_values

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch


@dataclass(frozen=True, slots=True)
class ExpandedPages:
    """Which pages of the pool are expanded; planned once a pass."""

    sources: Tensor
    """[E] int64, the pool's pages, sequence by sequence."""
    page_table: Tensor
    """[N, W] int32, where each sequence's pages stand in `sources`."""

    def keys_and_values(self, latent_pages: Tensor, up_k: Tensor, up_v: Tensor) -> tuple[Tensor, Tensor]:
        """latent_pages [P, page, C + rope], up_k [H, nope, C], up_v [H, Dv, C] → keys [E, page, H, nope + rope], values
        [E, page, H, Dv]."""
        return expanded_keys_and_values(latent_pages.index_select(0, self.sources), up_k, up_v)


def expand_pages(batch: Batch) -> ExpandedPages:
    """The pages of a prefill pass, whose lengths the host knows."""
    assert batch.kv_lengths_host is not None
    counts = [-(-keys // batch.page_size) for keys in batch.kv_lengths_host]
    starts = [0, *accumulate(counts)]
    width = max(counts, default=0)
    columns = torch.arange(width)
    table = torch.tensor(starts[:-1], dtype=torch.int64).unsqueeze(1) + columns
    present = columns < torch.tensor(counts).unsqueeze(1)
    # Where a sequence's pages lie in the flattened page table of the batch.
    flat = (torch.arange(len(counts)).unsqueeze(1) * batch.page_table.shape[1] + columns)[present]
    device = batch.page_table.device
    if device.type == "cuda":
        flat, table = flat.pin_memory(), table.pin_memory()
    sources = batch.page_table.flatten()[flat.to(device, non_blocking=True)].to(torch.int64)
    return ExpandedPages(sources, table.to(device, torch.int32, non_blocking=True))


def pages_bucket(batch: Batch) -> int:
    """Pages that are expanded in a captured pass: a few more than it has, so that fewer programs serve."""
    assert batch.kv_lengths_host is not None
    return bucket_of(sum(-(-keys // batch.page_size) for keys in batch.kv_lengths_host))


def expand_on_device(batch: Batch, count: int) -> ExpandedPages:
    """As `expand_pages`, with nothing from the host but `count`, the pages that are expanded: as many as there are, or more."""
    pages = (batch.kv_lengths + (batch.page_size - 1)) // batch.page_size
    ends = pages.cumsum(0)
    starts = ends - pages
    place = torch.arange(count, device=pages.device)
    # Behind the last sequence's pages any will do.
    owner = torch.searchsorted(ends, place, right=True).clamp_(max=pages.shape[0] - 1)
    column = (place - starts[owner]).clamp_(0, batch.page_table.shape[1] - 1)
    sources = batch.page_table[owner, column].to(torch.int64)
    columns = torch.arange(min(count, batch.page_table.shape[1]), device=pages.device)
    table = (starts.unsqueeze(1) + columns).clamp_(max=count - 1)
    return ExpandedPages(sources, table.to(torch.int32))
