"""Merging the splits of a sequence: softmax over the parts' log-sum-exps, weighted sum of their normalised outputs.

Sequences that one part finished were written by the decode kernel and are left alone, and so are those with few splits where
`expand` merges them; inert ones (no keys) get zeros here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.language import FIRST, LOADED, merge_runs, start_next, wait_for_inputs


@triton.jit
def combine_splits(
    out, partial, lse, spans, ROWS: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N, ROWS, 512]; partial [2 · parts, ROWS, 512] float32, lse [2 · parts, ROWS] float32 in log2 units.

    Grid (ROWS / EACH, 512 / COLUMNS, N). SPLITS are in flight at once; sequences of up to MOST are not merged. A sequence's
    piece in its first part is slot 2p + 1, in a later part 2p.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sequence = tl.program_id(2)
    start_next(PDL, FIRST)
    # The plan is older than the decode, which ends, or lets this kernel start, only after all in front of it.
    first = tl.load(spans + 2 * sequence)
    last = tl.load(spans + 2 * sequence + 1)
    wait_for_inputs(PDL)
    if last < first or last - first >= MOST:
        for row in range(tl.program_id(0) * EACH, (tl.program_id(0) + 1) * EACH):
            _merge_row(out, partial, lse, sequence, row, column, first, last, ROWS, COLUMNS, SPLITS, PDL)


@triton.jit
def _merge_row(
    out, partial, lse, sequence, row, column, first, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    target = out + (sequence * ROWS + row).to(tl.int64) * 512 + column
    index = tl.arange(0, SPLITS)
    top = -1.0e30
    total = 0.0
    acc = tl.zeros([COLUMNS], tl.float32)
    for base in range(first, last + 1, SPLITS):
        part = base + index
        slot = 2 * part + (part == first).to(tl.int32)
        inside = part <= last
        seen = tl.load(lse + slot * ROWS + row, mask=inside, other=float("-inf"))
        values = tl.load(
            partial + (slot * ROWS + row).to(tl.int64)[:, None] * 512 + column[None, :], mask=inside[:, None], other=0.0
        )
        acc, total, top = merge_runs(acc, total, top, seen, values)
    start_next(PDL, LOADED)
    tl.store(target, (acc / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty))
