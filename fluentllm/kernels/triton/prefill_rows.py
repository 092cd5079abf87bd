"""The rows of a prefill pass, from what the host uploads a chunk: one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import launch

if TYPE_CHECKING:
    from torch import Tensor

    from ..prefill_rows import PrefillRows


@triton.jit(do_not_specialize=["real", "rows", "sequences"])
def _prefill_rows_kernel(tokens, positions, row_sequences, kv_rows, query_start, kv_lengths, given, history, table, real, rows,
                         sequences, given_row, history_row, table_row, PAGE: tl.constexpr, STEPS: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    firsts = given + 2 * given_row
    # The last sequence whose first row is not behind this one, by halving.
    found = row * 0
    for step in tl.static_range(STEPS):
        other = found + (1 << (STEPS - 1 - step))
        first = tl.load(firsts + other, mask=other < sequences, other=2147483647)
        found = tl.where(first <= row, other, found)
    own = row < real
    slot = tl.load(given + found, mask=inside, other=0)
    start = tl.load(given + given_row + found, mask=inside, other=0)
    position = tl.where(own, start + row - tl.load(firsts + found, mask=inside, other=0), 0)
    page = tl.load(table + slot * table_row + position // PAGE, mask=inside & own, other=0).to(tl.int64)
    tl.store(tokens + row, tl.load(history + slot * history_row + position, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(positions + row, position, mask=inside)
    tl.store(row_sequences + row, found.to(tl.int64), mask=inside)
    tl.store(kv_rows + row, tl.where(own, page * PAGE + position % PAGE, 0), mask=inside)
    if tl.program_id(0) == 0:
        for base in range(0, sequences, BLOCK):
            n = base + tl.arange(0, BLOCK)
            here = n < sequences
            first = tl.load(firsts + n, mask=here, other=0)
            keys = tl.load(firsts + given_row + n, mask=here, other=0)
            tl.store(query_start + n, tl.minimum(first, rows).to(tl.int32), mask=here)
            tl.store(kv_lengths + n, keys.to(tl.int32), mask=here)
        tl.store(query_start + sequences, rows.to(tl.int32))


def prefill_rows(into: PrefillRows, real: int, rows: int, history: Tensor, page_table: Tensor, page_size: int) -> None:
    """Fill the first `rows` rows of `into` from its `given`, of which `real` are the chunks' and the rest is padding.

    history [S, L] int32 and page_table [S, W] int32 are the slot tables'. Reference: `..prefill_rows.prefill_rows_reference`.
    """
    sequences = into.given.shape[1]
    launch(
        _prefill_rows_kernel, (-(-rows // 256),), into.tokens, into.positions, into.sequences, into.kv_rows, into.query_start,
        into.kv_lengths, into.given, history, page_table, real, rows, sequences, into.given.stride(0), history.stride(0),
        page_table.stride(0), PAGE=page_size, STEPS=max(1, (sequences - 1).bit_length()), BLOCK=256, num_warps=4,
    )  # fmt: skip
