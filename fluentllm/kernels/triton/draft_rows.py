"""Rows of a draft layer, in one launch each: the target's, one position on, behind a pass; those of the drafts that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

MOST_COLUMNS = 1024
"""Values of a state that one program copies."""


@dataclass(slots=True)
class ShiftedRows:
    """What `shift_rows` finds for B sequences × q rows."""

    tokens: Tensor
    """[B · q] int64."""
    positions: Tensor
    """[B · q] int64."""
    kv_rows: Tensor
    """[B · q] int64."""
    kv_lengths: Tensor
    """[B] int32."""
    newest: Tensor
    """[B] int64, each sequence's row with the newest token of its history."""


@triton.jit
def _shift_kernel(tokens, out_positions, out_kv_rows, out_kv_lengths, newest, page_states, positions, kv_rows, kv_lengths,
                  slots, length, history, table, states, length_stride, history_row, table_row, states_row, page_states_row,
                  WIDTH: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Grid (rows, pieces of a state)."""
    row = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    before = tl.load(positions + row)
    kv_row = tl.load(kv_rows + row)
    position = before + 1
    # Rows of slots that had finished lie on page 0, whose state nobody reads.
    if (position % PAGE == 0) & (kv_row >= PAGE):
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        state = tl.load(states + row * states_row + i, mask=i < WIDTH)
        tl.store(page_states + kv_row // PAGE * page_states_row + i, state, mask=i < WIDTH)
    start_next(PDL, LOADED)
    if tl.program_id(1) == 0:
        sequence = row // ROWS
        slot = tl.load(slots + sequence)
        known = tl.load(length + slot * length_stride)
        page = tl.load(table + sequence * table_row + position // PAGE).to(tl.int64)
        written = (kv_row >= PAGE) & (position < known)
        tl.store(tokens + row, tl.load(history + slot * history_row + position).to(tl.int64))
        tl.store(out_positions + row, position)
        tl.store(out_kv_rows + row, tl.where(written, page * PAGE + position % PAGE, 0))
        if row % ROWS == 0:
            tl.store(out_kv_lengths + sequence, tl.load(kv_lengths + sequence) + 1)
            tl.store(newest + sequence, row + tl.maximum(known - 1 - position, 0))


def shift_rows(
    positions: Tensor,
    kv_rows: Tensor,
    kv_lengths: Tensor,
    page_table: Tensor,
    slots: Tensor,
    rows: int,
    length: Tensor,
    history: Tensor,
    page_size: int,
    states: Tensor,
    page_states: Tensor,
) -> ShiftedRows:
    """positions, kv_rows [B · q] int64, kv_lengths [B] int32, page_table [B, P] int32 and slots [B] int64 of a decode pass with
    q = `rows` rows a slot; columns of the slot tables: length int64 (any stride), history [S, L] int32; states [B · q, W] of
    the pass, of which those at a page's end are kept in page_states [pages + 1, W], rows contiguous in both.

    Reference: `step.draft_rows.shifted_reference`.
    """
    total, batch, device = positions.shape[0], slots.shape[0], slots.device
    tokens, out_positions, out_kv_rows = (torch.empty(total, dtype=torch.int64, device=device) for _ in range(3))
    newest = torch.empty(batch, dtype=torch.int64, device=device)
    out_kv_lengths = torch.empty(batch, dtype=torch.int32, device=device)
    width = states.shape[1]
    block = min(MOST_COLUMNS, power_of_2(width))
    launch(
        _shift_kernel, (total, -(-width // block)), tokens, out_positions, out_kv_rows, out_kv_lengths, newest, page_states,
        positions, kv_rows, kv_lengths, slots, length, history, page_table, states, length.stride(0), history.stride(0),
        page_table.stride(0), states.stride(0), page_states.stride(0),
        WIDTH=width, ROWS=rows, PAGE=page_size, BLOCK=block, num_warps=4, **programmatic(device),
    )  # fmt: skip
    return ShiftedRows(tokens, out_positions, out_kv_rows, out_kv_lengths, newest)


@dataclass(slots=True)
class NextRows:
    """One row a slot for each of C drafts behind the newest token."""

    positions: Tensor
    """[C, B] int64."""
    kv_rows: Tensor
    """[C, B] int64."""
    kv_lengths: Tensor
    """[C, B] int32."""
    sequences: Tensor
    """[B] int64."""
    query_start: Tensor
    """[B + 1] int32."""


@triton.jit(do_not_specialize=["batch"])
def _next_kernel(positions, kv_rows, kv_lengths, sequences, query_start, slots, length, finished, table, batch, length_stride,
                 table_row, COUNT: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    slot = tl.load(slots + sequence)
    j = tl.arange(0, BLOCK)
    inside = j < COUNT
    position = tl.load(length + slot * length_stride) + j
    live = tl.load(finished + slot) == 0
    page = tl.load(table + slot * table_row + position // PAGE, mask=inside, other=0).to(tl.int64)
    start_next(PDL, LOADED)
    at = j * batch + sequence
    tl.store(positions + at, position, mask=inside)
    tl.store(kv_rows + at, tl.where(live, page * PAGE + position % PAGE, 0), mask=inside)
    tl.store(kv_lengths + at, (position + 1).to(tl.int32), mask=inside)
    tl.store(sequences + sequence, sequence)
    tl.store(query_start + sequence, sequence.to(tl.int32))
    if sequence == batch - 1:
        tl.store(query_start + batch, batch)


def next_rows(slots: Tensor, count: int, length: Tensor, finished: Tensor, page_table: Tensor, page_size: int) -> NextRows:
    """slots [B] int64 → rows for `count` drafts at positions length, length + 1, … of each; columns of the slot tables: length
    int64 (any stride), finished bool, page_table [S, P] int32. Rows of finished slots write to the scratch row 0.

    Reference: `step.draft_rows.next_rows_reference`.
    """
    batch, device = slots.shape[0], slots.device
    positions, kv_rows = (torch.empty(count, batch, dtype=torch.int64, device=device) for _ in range(2))
    kv_lengths = torch.empty(count, batch, dtype=torch.int32, device=device)
    sequences = torch.empty(batch, dtype=torch.int64, device=device)
    query_start = torch.empty(batch + 1, dtype=torch.int32, device=device)
    launch(
        _next_kernel, (batch,), positions, kv_rows, kv_lengths, sequences, query_start, slots, length, finished, page_table,
        batch, length.stride(0), page_table.stride(0),
        COUNT=count, PAGE=page_size, BLOCK=power_of_2(count), num_warps=1, **programmatic(device),
    )  # fmt: skip
    return NextRows(positions, kv_rows, kv_lengths, sequences, query_start)
