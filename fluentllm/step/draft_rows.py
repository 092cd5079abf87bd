"""Which rows the draft layer computes after a pass of the target: the target's rows, one position on.

The pair (hidden state at p, token at p + 1) belongs to index p + 1, so a pass over positions p … q gives the draft layer
p + 1 … q + 1. The token at q + 1 is in the history by then: it was drawn just now, or the prompt goes on.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.slots import SlotTables
from ..core.staging import upload_all


def shifted(batch: Batch, tables: SlotTables) -> Batch:
    """Of a decode pass with q rows a slot: as many rows, each one position on.

    Rows behind the end of the history belong to drafts that were wrong, and those of slots that had finished before are
    inert: they write to the scratch page.
    """
    positions = batch.positions + 1
    row_slots = batch.slots[batch.sequences]
    rows = _kv_rows(batch, batch.sequences, positions)
    written = (batch.kv_rows >= batch.page_size) & (positions < tables.length[row_slots])
    return replace(
        batch,
        tokens=batch.history[row_slots, positions].to(torch.int64),
        positions=positions,
        kv_lengths=batch.kv_lengths + 1,
        kv_rows=rows.where(written, 0),
    )


def shifted_chunks(batch: Batch, page_states: Tensor, states: Tensor) -> tuple[Batch, Tensor]:
    """Of a prefill pass: the rows one position on, and their states [T', width]; `states` [T, width] those of the pass's own.

    A chunk that starts where a page does gets one more row, for the position that it starts at: after a prefix hit nobody
    else computes it. The state before it is `page_states` [pages + 1, width] of the page before. Elsewhere the chunk before
    has computed that row. All lengths are known to the host, so nothing waits for the device.
    """
    device = states.device
    assert batch.query_lengths is not None
    assert batch.kv_lengths_host is not None
    counts, ends = batch.query_lengths, batch.kv_lengths_host
    starts = [end - count for count, end in zip(counts, ends, strict=True)]
    opens = [start % batch.page_size == 0 for start in starts]
    lengths = tuple(count + opened for count, opened in zip(counts, opens, strict=True))

    pages_before = [max(start - 1, 0) // batch.page_size for start in starts]
    length_of, end_of, query_start, opened, before = upload_all(
        [lengths, ends, [0, *accumulate(lengths)], opens, pages_before], device
    )
    rows = torch.arange(sum(lengths), device=device)
    sequences = torch.repeat_interleave(length_of, output_size=sum(lengths))
    position = rows - query_start[sequences + 1] + end_of[sequences] + 1
    # Rows of cat(states, states before the chunks), for each row of the new pass.
    first, inner = batch.query_start.to(torch.int64)[sequences], rows - query_start[sequences] - opened[sequences]
    sources = (first + inner).where(inner >= 0, states.shape[0] + sequences)
    before_chunks = page_states[batch.page_table.gather(1, before.unsqueeze(1)).squeeze(1)]
    row_slots = batch.slots[sequences]
    chunks = replace(
        batch,
        tokens=batch.history[row_slots, position].to(torch.int64),
        positions=position,
        sequences=sequences,
        query_start=query_start.to(torch.int32),
        kv_lengths=batch.kv_lengths + 1,
        kv_rows=_kv_rows(batch, sequences, position),
        query_lengths=lengths,
        kv_lengths_host=tuple(end + 1 for end in ends),
    )
    return chunks, torch.cat((states, before_chunks))[sources]


def next_rows(slots: Tensor, tokens: Tensor, positions: Tensor, page_table: Tensor, tables: SlotTables, batch: Batch) -> Batch:
    """One row for each of slots [B]: `tokens` [B] int64 at `positions` [B] int64, drafts. Finished slots are inert."""
    device = slots.device
    sequences = torch.arange(slots.shape[0], device=device)
    drafts = replace(
        batch,
        tokens=tokens,
        positions=positions,
        sequences=sequences,
        slots=slots,
        query_start=torch.arange(slots.shape[0] + 1, dtype=torch.int32, device=device),
        kv_lengths=(positions + 1).to(torch.int32),
        page_table=page_table,
        query_length=1,
        query_lengths=None,
        kv_lengths_host=None,
    )
    drafts.kv_rows = _kv_rows(drafts, sequences, positions).where(~tables.finished[slots], 0)
    return drafts


def _kv_rows(batch: Batch, sequences: Tensor, positions: Tensor) -> Tensor:
    pages = batch.page_table[sequences, positions // batch.page_size]
    return pages * batch.page_size + positions % batch.page_size
