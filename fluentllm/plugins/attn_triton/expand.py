"""MLA prefill in expanded form: the latents of all of a pass's sequences, gathered page by page and multiplied out to heads.

The result has pages of its own, so the prefill kernel for grouped heads reads it as it reads any pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from fluentllm.core.staging import to_device
from fluentllm.kernels.attention_mla import expanded_keys_and_values
from fluentllm.kernels.pass_pages import pages_of_pass

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
    columns = torch.arange(width, dtype=torch.int32)
    table = torch.tensor(starts[:-1], dtype=torch.int32).unsqueeze(1) + columns
    present = columns < torch.tensor(counts).unsqueeze(1)
    # Where a sequence's pages lie in the flattened page table of the batch.
    flat = (torch.arange(len(counts)).unsqueeze(1) * batch.page_table.shape[1] + columns)[present]
    flat, table = (to_device(tensor, batch.page_table.device) for tensor in (flat, table))
    return ExpandedPages(batch.page_table.flatten()[flat].to(torch.int64), table)


def expand_on_device(batch: Batch, count: int) -> ExpandedPages:
    """As `expand_pages`, with nothing from the host but `count`, the pages that are expanded: as many as there are, or more."""
    pages = pages_of_pass(batch.kv_lengths, batch.page_size, count, batch.page_table.shape[1])
    return ExpandedPages(batch.page_table[pages.owner, pages.column].to(torch.int64), pages.table)
