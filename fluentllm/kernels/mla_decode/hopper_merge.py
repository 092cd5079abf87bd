"""Merging a sequence's splits where they were computed: its CTAs count themselves, wait for each other, and take a share each.

Counting and waiting is done by each of the two partitions that hold a half of the output's columns, for its half. A CTA has
counted all its pieces before it waits, so they wait for each other in no circle; but all must be on the chip at once.

Counters are never set back between the layers of a step: every launch adds as many as a sequence has splits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..triton.hopper_language import barrier
from .hopper_common import exp2

FEW: gl.constexpr = gl.constexpr(8)
"""Splits that are all in flight at once."""
FEW_ROWS: gl.constexpr = gl.constexpr(4)
"""Rows of a share then; otherwise one row, half of its columns."""
MANY: gl.constexpr = gl.constexpr(32)
"""Splits in flight where there are more."""
PATIENCE: gl.constexpr = gl.constexpr(1 << 23)
"""Looks at a counter, about half a microsecond each, before the kernel gives up."""


@gluon.jit
def count_piece(work, piece, GROUPS: gl.constexpr, HALF: gl.constexpr):
    """A split's results are written: say so. → what the counter was."""
    before = 0
    if piece.last - piece.first < (piece.keys + 63) // 64:
        # All threads' results are written before the one that counts says so.
        barrier()
        cell = work.counters + (piece.sequence * GROUPS + gl.program_id(0) % GROUPS) * 2 + HALF
        before = gl.atomic_add(cell, 1, sem="acq_rel", scope="gpu")
    return before


@gluon.jit
def _merge_share(results, sequence, first, splits, row, column, known_rows, ROWS: gl.constexpr, L: gl.constexpr,
                 SPLITS: gl.constexpr, ONCE: gl.constexpr):  # fmt: skip
    """Rows `row` (those < known_rows), columns `column` of all splits → out. L: layout of [SPLITS, rows, columns], of which no
    row's splits and no splits' row are in different warps. ONCE: there are no more than SPLITS."""
    R: gl.constexpr = gl.SliceLayout(2, L)
    index = gl.arange(0, SPLITS, gl.SliceLayout(1, R))
    inside = (row < known_rows)[None, :]
    # Finite, so that the difference of two is never NaN; a split without a visible key has -inf and weighs nothing.
    top = gl.full([row.shape[0]], -1.0e30, gl.float32, gl.SliceLayout(0, R))
    total = gl.zeros([row.shape[0]], gl.float32, gl.SliceLayout(0, R))
    acc = gl.zeros([row.shape[0], column.shape[0]], gl.float32, gl.SliceLayout(0, L))
    for base in range(0, 1 if ONCE else splits, SPLITS):
        split = base + index
        there = (split < splits)[:, None] & inside
        # A sequence's piece in its first part is slot 2p + 1, in a later part 2p. 32 bits hold it: rows times parts are no more
        # than 64 times multiprocessors.
        slot = 2 * (first + split) + (split == 0).to(gl.int32)
        place = slot[:, None] * ROWS + row[None, :]
        weight = gl.load(results.lse + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        at = gl.expand_dims(place * 512, 2) + gl.expand_dims(gl.expand_dims(column, 0), 0)
        values = gl.load(results.partial + at, mask=gl.expand_dims(there, 2), other=0.0, cache_modifier=".cg")
        # All loads are on their way before the first is waited for.
        barrier()
        new_top = gl.maximum(top, gl.max(weight, 0))
        weight = exp2(weight - new_top[None, :])
        found = gl.sum(gl.expand_dims(weight, 2) * values, 0)
        if ONCE:
            total = gl.sum(weight, 0)
            acc = found
        else:
            alpha = exp2(top - new_top)
            total = total * alpha + gl.sum(weight, 0)
            moved = gl.convert_layout(alpha, gl.SliceLayout(1, gl.SliceLayout(0, L)))
            acc = acc * moved[:, None] + found
        top = new_top
    scale = gl.convert_layout(1.0 / gl.where(total > 0, total, 1.0), gl.SliceLayout(1, gl.SliceLayout(0, L)))
    own_row = gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(0, L)))
    own_column = gl.convert_layout(column, gl.SliceLayout(0, gl.SliceLayout(0, L)))
    target = results.out + (sequence * ROWS + own_row).to(gl.int64)[:, None] * 512 + own_column[None, :]
    gl.store(target, (acc * scale[:, None]).to(results.out.dtype.element_ty), mask=(own_row < known_rows)[:, None])


@gluon.jit
def _merge_sequence(results, work, sequence, first, splits, part, before, ROWS: gl.constexpr, GROUPS: gl.constexpr,
                    HALF: gl.constexpr):  # fmt: skip
    if splits > 1:
        group = gl.program_id(0) % GROUPS
        cell = work.counters + (sequence * GROUPS + group) * 2 + HALF
        wanted = (before // splits + 1) * splits
        tries = 0
        while gl.atomic_add(cell, 0, sem="acquire", scope="gpu") < wanted:
            tries += 1
            if tries > PATIENCE:
                # Seconds: a CTA of this grid is not on the chip, and never will be. An error beats waiting for ever.
                gl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r,r", [tries], dtype=gl.int32, is_pure=False, pack=1)
        own = part - first
        begin = group * 64
        end = gl.minimum(begin + 64, ROWS)
        if splits <= FEW:
            F: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 2, 2], [2, 1, 0])
            row = gl.arange(0, FEW_ROWS, gl.SliceLayout(0, gl.SliceLayout(2, F)))
            column = HALF * 256 + gl.arange(0, 256, gl.SliceLayout(0, gl.SliceLayout(0, F)))
            for base in range(begin + own * FEW_ROWS, end, splits * FEW_ROWS):
                _merge_share(results, sequence, first, splits, base + row, column, end, ROWS, F, FEW, True)
        else:
            M: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 1, 8], [1, 1, 4], [2, 1, 0])
            one = gl.arange(0, 1, gl.SliceLayout(0, gl.SliceLayout(2, M)))
            half = HALF * 256 + gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(0, M)))
            for item in range(begin * 2 + own, end * 2, splits):
                _merge_share(results, sequence, first, splits, item // 2 + one, item % 2 * 128 + half, end, ROWS, M,
                             MANY, False)  # fmt: skip


@gluon.jit
def ends_of_part(work, begin, end):
    """First part and splits of a part's first sequence, and of its last: only these can have splits elsewhere."""
    last = gl.maximum(end - 1, 0)
    # A part without work may begin behind the last sequence.
    begin = gl.minimum(begin, work.count - 1)
    first_a = gl.load(work.spans + 2 * begin)
    last_a = gl.load(work.spans + 2 * begin + 1)
    first_b = gl.load(work.spans + 2 * last)
    last_b = gl.load(work.spans + 2 * last + 1)
    return first_a, last_a - first_a + 1, first_b, last_b - first_b + 1


@gluon.jit
def merge_splits(results, work, part, begin, end, ends, before_a, before_b, ROWS: gl.constexpr, GROUPS: gl.constexpr,
                 HALF: gl.constexpr):  # fmt: skip
    """End of a part. ends: `ends_of_part`; `before_a`, `before_b`: what `count_piece` gave for them."""
    first_a, splits_a, first_b, splits_b = ends
    for _ in range(gl.minimum(end - begin, 2)):
        _merge_sequence(results, work, begin, first_a, splits_a, part, before_a, ROWS, GROUPS, HALF)
        begin = end - 1
        first_a = first_b
        splits_a = splits_b
        before_a = before_b


@gluon.jit
def clear_inert(out, work, GROUPS: gl.constexpr, ROWS: gl.constexpr, HALF: gl.constexpr):
    """Zeros for sequences without keys, shared out among all parts."""
    Z: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = gl.program_id(0) % GROUPS * 64 + gl.arange(0, 16, gl.SliceLayout(1, Z))
    column = HALF * 256 + gl.arange(0, 256, gl.SliceLayout(0, Z))
    for sequence in range(gl.program_id(0) // GROUPS, work.count, work.parts):
        if gl.load(work.lengths + sequence) == 0:
            for base in range(0, gl.minimum(64, ROWS), 16):
                target = out + (sequence * ROWS + base + row).to(gl.int64)[:, None] * 512 + column[None, :]
                gl.store(target, gl.zeros([16, 256], out.dtype.element_ty, Z), mask=(base + row < ROWS)[:, None])
