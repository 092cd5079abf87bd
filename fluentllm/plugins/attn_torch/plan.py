"""What all layers of one forward pass share: which keys each row sees, worked out once from the batch.

Reads lengths on the host: on the CPU that is free, on a GPU this backend is for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch


@dataclass(slots=True)
class DecodePlan:
    """N sequences of q rows each, their keys gathered to one length L, a multiple of the page size."""

    sequences: int
    rows: int
    """q."""
    keys: int
    """L."""
    pages: Tensor
    """[N, P] page numbers."""
    side_by_side: slice | None
    """The slice of the pool, if there is one sequence and its pages are neighbours."""
    mask: Tensor
    """[N, 1, q, L], 0 where the row sees the key, else -inf; in the activations' dtype."""


@dataclass(slots=True)
class SequencePlan:
    """The rows `start … stop` of a prefill pass, which are one sequence's."""

    start: int
    stop: int
    keys: int
    """Keys of the sequence, cached ones included."""
    pages: Tensor | None
    """[P] page numbers; None where all of its keys are this pass's own."""
    mask: Tensor | None
    """[1, 1, rows, keys] bool, True where the row sees the key; None: plain causal."""


def plan_decode(batch: Batch, dtype: torch.dtype) -> DecodePlan:
    rows = batch.query_length
    assert rows is not None
    sequences = batch.kv_lengths.shape[0]
    page_size = batch.page_size
    longest = int(batch.kv_lengths.max()) if sequences else 0
    count = -(-longest // page_size)
    table = batch.page_table[:, :count]
    keys = count * page_size
    index = torch.arange(keys, device=table.device)
    positions = batch.positions.view(sequences, 1, rows, 1)
    hidden = index > positions
    if batch.first_key:
        hidden = (index > positions.clamp(min=batch.first_key)) | (index < batch.first_key)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=table.device).masked_fill_(hidden, float("-inf"))
    return DecodePlan(sequences, rows, keys, table, _side_by_side(table), mask)


def _side_by_side(table: Tensor) -> slice | None:
    if table.shape[0] != 1:
        return None
    numbers = table[0].tolist()
    whole = range(numbers[0], numbers[0] + len(numbers))
    return slice(whole.start, whole.stop) if numbers == list(whole) else None


def plan_prefill(batch: Batch) -> list[SequencePlan]:
    starts = batch.query_start.tolist()
    lengths = batch.kv_lengths_host or tuple(batch.kv_lengths.tolist())
    plans = []
    for number, (start, stop, keys) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        rows = stop - start
        if not rows:
            continue
        if keys == rows and not batch.first_key:
            plans.append(SequencePlan(start, stop, keys, None, None))
            continue
        pages = batch.page_table[number, : -(-keys // batch.page_size)]
        index = torch.arange(keys, device=pages.device)
        mask = index <= batch.positions[start:stop].unsqueeze(1).clamp(min=batch.first_key)
        if batch.first_key:
            mask &= index >= batch.first_key
        plans.append(SequencePlan(start, stop, keys, pages, mask[None, None]))
    return plans
