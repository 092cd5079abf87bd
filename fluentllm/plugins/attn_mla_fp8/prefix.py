"""Where a prefill pass has its tokens: a workspace with pages of its own, filled with fresh ones and with cached ones.

Planned once a pass, from lengths that the host knows. `kernels.triton.gqa_prefill` reads the workspace as it reads a pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fluentllm.core.staging import to_device
from fluentllm.kernels.pass_pages import pages_of_pass

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch


@dataclass(frozen=True, slots=True)
class Workspace:
    """For all layers of a pass."""

    pages: int
    page_table: Tensor
    """[N, W] int32: where each sequence's pages stand in the workspace."""
    fresh: Tensor
    """[T] int64: the workspace's rows of the pass's own tokens."""
    cached: Tensor
    """[F] int64: token rows of the pool, of what was computed before the pass."""
    cached_to: Tensor | None
    """[F] int64: the workspace's rows of those. None: `cached` has one for each of its rows; those of fresh tokens are found in
    it later."""


def workspace_on_device(batch: Batch, count: int) -> Workspace:
    """As `plan_workspace`, with nothing from the host but `count`, its pages: as many as there are, or more. One more takes the
    rows of padding."""
    size = batch.page_size
    pages = pages_of_pass(batch.kv_lengths, size, count, batch.page_table.shape[1])
    fresh = pages.first[batch.sequences] * size + batch.positions
    fresh = fresh.where(batch.kv_lengths[batch.sequences] > 0, count * size)
    position = pages.column.unsqueeze(1) * size + torch.arange(size, device=fresh.device)
    before = batch.kv_lengths - batch.query_start.diff()
    rows = batch.page_table[pages.owner, pages.column].to(torch.int64).unsqueeze(1) * size + position % size
    cached = rows.where(position < before[pages.owner].unsqueeze(1), 0)
    return Workspace(count + 1, pages.table, fresh, cached.flatten(), None)


def plan_workspace(batch: Batch) -> Workspace:
    lengths, counts = batch.kv_lengths_host, batch.query_lengths
    assert lengths is not None
    assert counts is not None
    size = batch.page_size
    pages = torch.tensor([-(-keys // size) for keys in lengths], dtype=torch.int64)
    first_page = torch.cat((pages.new_zeros(1), pages.cumsum(0)))
    width = int(pages.max()) if lengths else 0
    table = (first_page[:-1].unsqueeze(1) + torch.arange(width)).to(torch.int32)
    starts = [keys - count for keys, count in zip(lengths, counts, strict=True)]
    bases = (first_page[:-1] * size).tolist()
    nothing = torch.arange(0)
    fresh = torch.cat([nothing, *(torch.arange(b + s, b + k) for b, s, k in zip(bases, starts, lengths, strict=True))])
    position = torch.cat([nothing, *(torch.arange(start) for start in starts)])
    cached_to = torch.cat([nothing, *(torch.arange(b, b + s) for b, s in zip(bases, starts, strict=True))])
    # Where the pages of cached tokens stand in the flattened page table of the batch.
    owner = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(starts, dtype=torch.int64))
    entry = owner * batch.page_table.shape[1] + position // size
    table, fresh, cached_to, entry, offset = (
        to_device(tensor, batch.page_table.device) for tensor in (table, fresh, cached_to, entry, position % size)
    )
    cached = batch.page_table.flatten()[entry].to(torch.int64) * size + offset
    return Workspace(int(first_page[-1]), table, fresh, cached, cached_to)
