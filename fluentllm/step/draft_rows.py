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
from ..kernels import in_kernels


def shifted(batch: Batch, tables: SlotTables, states: Tensor, page_states: Tensor) -> tuple[Batch, Tensor]:
    """As `shifted_reference`, of which this is one launch on a GPU."""
    if not in_kernels(states):
        return shifted_reference(batch, tables, states, page_states)
    from ..kernels.triton.draft_rows import shift_rows

    assert batch.query_length is not None
    found = shift_rows(
        batch.positions, batch.kv_rows, batch.kv_lengths, batch.page_table, batch.slots, batch.query_length, tables.length,
        batch.history, batch.page_size, states, page_states,
    )  # fmt: skip
    rows = replace(batch, tokens=found.tokens, positions=found.positions, kv_lengths=found.kv_lengths, kv_rows=found.kv_rows)
    return rows, found.newest


def shifted_reference(batch: Batch, tables: SlotTables, states: Tensor, page_states: Tensor) -> tuple[Batch, Tensor]:
    """Of a decode pass with q rows a slot: as many rows, each one position on, and [N] int64, for each sequence the row of its
    newest token. `states` [T, width] of the pass; those at a page's end are kept in `page_states` [pages + 1, width].

    Rows behind the end of the history belong to drafts that were wrong, and those of slots that had finished before are
    inert: they write to the scratch page.
    """
    keep_page_ends(batch, states, page_states, (batch.positions + 1) % batch.page_size == 0)
    positions = batch.positions + 1
    row_slots = batch.slots[batch.sequences]
    rows = _kv_rows(batch, batch.sequences, positions)
    written = (batch.kv_rows >= batch.page_size) & (positions < tables.length[row_slots])
    first = batch.query_start[:-1].to(torch.int64)
    # Nothing was added to slots that had finished before: any row will do.
    newest = first + (tables.length[batch.slots] - 1 - positions[first]).clamp(min=0)
    return replace(
        batch,
        tokens=batch.history[row_slots, positions].to(torch.int64),
        positions=positions,
        kv_lengths=batch.kv_lengths + 1,
        kv_rows=rows.where(written, 0),
    ), newest


def keep_page_ends(batch: Batch, states: Tensor, page_states: Tensor, ends: Tensor) -> None:
    """Write the states [T, width] of the rows that `ends` [T] bool names to their pages' places in `page_states`. Those of
    wrong drafts are written too, and again when the position is; all others write to page 0, whose state nobody reads."""
    page_states[(batch.kv_rows // batch.page_size).where(ends, 0)] = states


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


def next_rows(slots: Tensor, count: int, page_table: Tensor, tables: SlotTables, batch: Batch) -> list[Batch]:
    """As `next_rows_reference`, of which this is one launch on a GPU."""
    if not count or not in_kernels(slots):
        return next_rows_reference(slots, count, page_table, tables, batch)
    from ..kernels.triton.draft_rows import next_rows as launch

    found = launch(slots, count, tables.length, tables.finished, tables.page_table, tables.page_size)
    columns = zip(found.positions, found.kv_rows, found.kv_lengths, strict=True)
    return [_row_each(batch, slots, page_table, found.sequences, found.query_start, *column) for column in columns]


def next_rows_reference(slots: Tensor, count: int, page_table: Tensor, tables: SlotTables, batch: Batch) -> list[Batch]:
    """Passes over one row for each of slots [B], at the positions of its first, second … draft of `count`; the drafts are not
    there yet, so `tokens` are still to be set. `page_table` [B, P] is the slots'. Finished slots are inert."""
    device = slots.device
    sequences = torch.arange(slots.shape[0], device=device)
    query_start = torch.arange(slots.shape[0] + 1, dtype=torch.int32, device=device)
    live, first = ~tables.finished[slots], tables.length[slots]
    passes = []
    for positions in (first + i for i in range(count)):
        rows = _row_each(batch, slots, page_table, sequences, query_start, positions, slots, (positions + 1).to(torch.int32))
        rows.kv_rows = _kv_rows(rows, sequences, positions).where(live, 0)
        passes.append(rows)
    return passes


def _row_each(
    batch: Batch,
    slots: Tensor,
    page_table: Tensor,
    sequences: Tensor,
    query_start: Tensor,
    positions: Tensor,
    kv_rows: Tensor,
    kv_lengths: Tensor,
) -> Batch:
    """A decode pass of one row a slot, beside `batch`."""
    return replace(
        batch,
        positions=positions,
        sequences=sequences,
        slots=slots,
        query_start=query_start,
        kv_lengths=kv_lengths,
        page_table=page_table,
        kv_rows=kv_rows,
        query_length=1,
        query_lengths=None,
        kv_lengths_host=None,
    )


def _kv_rows(batch: Batch, sequences: Tensor, positions: Tensor) -> Tensor:
    pages = batch.page_table[sequences, positions // batch.page_size]
    return pages * batch.page_size + positions % batch.page_size
