"""Around a decode pass, one launch each: slots to rows before it, drawn tokens to slots after it, drafts for the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launch import launch, power_of_2

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class DecodeRows:
    """The device half of a `core.batch.Batch` of B sequences × q rows."""

    tokens: Tensor
    """[B · q] int64."""
    positions: Tensor
    """[B · q] int64."""
    sequences: Tensor
    """[B · q] int64, each row's sequence."""
    query_start: Tensor
    """[B + 1] int32."""
    kv_rows: Tensor
    """[B · q] int64."""
    kv_lengths: Tensor
    """[B] int32."""
    page_table: Tensor
    """[B, P] int32."""


@triton.jit
def _rows_kernel(tokens, positions, sequences, query_start, kv_rows, kv_lengths, page_table, slots, length, drafted, finished,
                 history, table, pages, int_stride, history_row, table_row, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                 PAGE: tl.constexpr, BLOCK_PAGES: tl.constexpr):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    first = tl.load(length + slot * int_stride) - 1
    j = tl.arange(0, BLOCK_ROWS)
    inside = j < ROWS
    position = first + j
    page = tl.load(table + slot * table_row + position // PAGE, mask=inside, other=0).to(tl.int64)
    row = page * PAGE + position % PAGE
    live = (tl.load(finished + slot) == 0) & (j <= tl.load(drafted + slot * int_stride))
    row = tl.where(live, row, 0)
    at = sequence * ROWS + j
    tl.store(tokens + at, tl.load(history + slot * history_row + position, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(positions + at, position, mask=inside)
    tl.store(sequences + at, j * 0 + sequence, mask=inside)
    # Each sequence its first row, and the last one where the rows end.
    tl.store(query_start + sequence, (sequence * ROWS).to(tl.int32))
    if sequence == tl.num_programs(0) - 1:
        tl.store(query_start + sequence + 1, ((sequence + 1) * ROWS).to(tl.int32))
    tl.store(kv_rows + at, row, mask=inside)
    tl.store(kv_lengths + sequence, (first + ROWS).to(tl.int32))
    for base in range(0, pages, BLOCK_PAGES):
        p = base + tl.arange(0, BLOCK_PAGES)
        tl.store(page_table + sequence * pages + p, tl.load(table + slot * table_row + p, mask=p < pages), mask=p < pages)


def decode_rows(
    slots: Tensor,
    rows: int,
    length: Tensor,
    drafted: Tensor,
    finished: Tensor,
    history: Tensor,
    page_table: Tensor,
    page_size: int,
    *,
    pages: int | None = None,
) -> DecodeRows:
    """slots [B] int64; columns of the slot tables: length and drafted int64 (of one stride), finished bool, history [S, L]
    int32, page_table [S, W] int32, of which the first `pages` columns are gathered. Rows of finished slots, and those of drafts
    that nobody left, write to the scratch row 0.

    Reference: `step.decode.decode_batch_reference`.
    """
    batch, device = slots.shape[0], slots.device
    pages = page_table.shape[1] if pages is None else pages
    tokens, positions, sequences, kv_rows = (torch.empty(batch * rows, dtype=torch.int64, device=device) for _ in range(4))
    query_start = torch.empty(batch + 1, dtype=torch.int32, device=device)
    kv_lengths = torch.empty(batch, dtype=torch.int32, device=device)
    gathered = torch.empty(batch, pages, dtype=torch.int32, device=device)
    launch(
        _rows_kernel, (batch,), tokens, positions, sequences, query_start, kv_rows, kv_lengths, gathered, slots, length,
        drafted, finished, history, page_table, pages, length.stride(0), history.stride(0), page_table.stride(0),
        ROWS=rows, BLOCK_ROWS=power_of_2(rows), PAGE=page_size, BLOCK_PAGES=1024, num_warps=4,
    )  # fmt: skip
    return DecodeRows(tokens, positions, sequences, query_start, kv_rows, kv_lengths, gathered)


@triton.jit
def _commit_kernel(packed, drawn, drafts, slots, length, end, drafted, finished, stop_ids, history, counts, equal, draft_row,
                   int_stride, stop_row, history_row, counts_row, equal_row,
                   ROWS: tl.constexpr, STOPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_STOPS: tl.constexpr):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    live = tl.load(finished + slot) == 0
    known = tl.load(length + slot * int_stride)
    limit = tl.load(end + slot * int_stride)
    offered = tl.minimum(tl.load(drafted + slot * int_stride), ROWS - 1)

    j = tl.arange(0, BLOCK_ROWS)
    inside = j < ROWS
    token = tl.load(drawn + sequence * ROWS + j, mask=inside, other=-2)
    if equal is not None:
        same = tl.load(equal + sequence * equal_row + j, mask=j + 1 < ROWS, other=0) != 0
    else:
        same = token == tl.load(drafts + sequence * draft_row + j, mask=j + 1 < ROWS, other=-1)
    # The first row whose draft is not the token drawn there is the last that counts.
    right = tl.min(tl.where(same & (j < offered), BLOCK_ROWS, j), 0)
    s = tl.arange(0, BLOCK_STOPS)
    stops = tl.load(stop_ids + slot * stop_row + s, mask=s < STOPS, other=-1)
    is_stop = tl.max((token[:, None] == stops[None, :]).to(tl.int32), 1) > 0
    stop_at = tl.min(tl.where(is_stop & inside, j, BLOCK_ROWS), 0)
    room = tl.where(live, limit - known, 0)
    new = (j <= right) & (j <= stop_at) & (j < room) & inside
    count = tl.sum(new.to(tl.int32), 0)
    stopped = stop_at < count
    full = live & (known + count >= limit) & (stopped == 0)

    tl.store(history + slot * history_row + known + j, token.to(tl.int32), mask=new)
    if counts is not None:
        tl.atomic_add(counts + slot * counts_row + token, 1, mask=new)
    # Inert slots may appear several times in a batch; nothing of theirs is written but what all would write alike.
    tl.store(drafted + slot * int_stride, tl.zeros([], tl.int64))
    tl.store(length + slot * int_stride, known + count, mask=live)
    tl.store(finished + slot, (stopped | full).to(tl.int1), mask=live)
    out = packed + sequence * (ROWS + 4)
    tl.store(out + j, token, mask=inside)
    tl.store(out + ROWS, count.to(tl.int64))
    tl.store(out + ROWS + 1, tl.where(stopped, 1, tl.where(full, 2, 0)).to(tl.int64))
    tl.store(out + ROWS + 2, tl.where(live, offered, 0))
    tl.store(out + ROWS + 3, tl.minimum(right, tl.maximum(count - 1, 0)).to(tl.int64))


def commit_tokens(
    drawn: Tensor,
    drafts: Tensor,
    slots: Tensor,
    length: Tensor,
    end: Tensor,
    drafted: Tensor,
    finished: Tensor,
    stop_ids: Tensor,
    history: Tensor,
    output_counts: Tensor | None = None,
    equal: Tensor | None = None,
) -> Tensor:
    """drawn [B, q] int64, contiguous; drafts [B, q - 1] int64, its rows contiguous; slots [B] int64; the rest the slot
    tables': length, end, drafted int64 columns of one table, finished bool, stop_ids [S, M] int32, history [S, L] int32,
    output_counts [S, V] int32 where penalties count; equal [B, q - 1] bool, its rows contiguous, says which drafts are right
    where it is not equality.

    Updates the tables → packed [B, q + 4] int64, for one copy to the host: tokens, then count, state (0 runs, 1 stopped, 2 out
    of budget), drafts verified, drafts accepted. Reference: `step.commit.commit_reference`.
    """
    batch, rows = drawn.shape
    packed = torch.empty(batch, rows + 4, dtype=torch.int64, device=drawn.device)
    stops = stop_ids.shape[1]
    launch(
        _commit_kernel, (batch,), packed, drawn, drafts, slots, length, end, drafted, finished, stop_ids, history,
        output_counts, equal, drafts.stride(0), length.stride(0), stop_ids.stride(0), history.stride(0),
        0 if output_counts is None else output_counts.stride(0), 0 if equal is None else equal.stride(0),
        ROWS=rows, STOPS=stops, BLOCK_ROWS=power_of_2(rows), BLOCK_STOPS=power_of_2(stops), num_warps=1,
    )  # fmt: skip
    return packed


@triton.jit
def _leave_kernel(drafts, valid, slots, length, drafted, history, vocab, int_stride, history_row, COUNT: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    known = tl.load(length + slot * int_stride)
    j = tl.arange(0, BLOCK)
    draft = tl.load(drafts + sequence * COUNT + j, mask=j < COUNT, other=0)
    draft = tl.minimum(tl.maximum(draft, 0), vocab - 1)
    tl.store(history + slot * history_row + known + j, draft.to(tl.int32), mask=j < COUNT)
    tl.store(drafted + slot * int_stride, tl.minimum(tl.maximum(tl.load(valid + sequence), 0), COUNT))


def leave_drafts(
    drafts: Tensor, valid: Tensor, slots: Tensor, length: Tensor, drafted: Tensor, history: Tensor, vocab: int
) -> None:
    """drafts [B, K] int64, contiguous, of which the first `valid` [B] int64 count, behind the slots' histories; ids and counts
    are clamped to what there can be. Tables as in `commit_tokens`. Reference: `step.commit.leave_drafts_reference`."""
    batch, count = drafts.shape
    launch(
        _leave_kernel, (batch,), drafts, valid, slots, length, drafted, history, vocab, length.stride(0), history.stride(0),
        COUNT=count, BLOCK=power_of_2(count), num_warps=1,
    )  # fmt: skip
