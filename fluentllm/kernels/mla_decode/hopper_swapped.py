"""MLA decode on Hopper for few rows, operands swapped: keys, and columns of the output, on the MMA's M.

An MMA's M is 64 rows whether they are used or not, its N any multiple of 8: S^T = K Q^T and O^T = V^T P^T multiply no rows that
are not there, and the output is spread over all warps, so scaling and storing it does too. V needs no transpose: 16-bit WGMMA
also takes its first operand as it lies, columns first. Queries come by TMA.

Here are the partition of the scores and those that hold the output, for any cache. How a page is scored, and how its values are
added, the kernel of each cache says (`hopper_fp8_few`, `hopper_bf16_few`): by functions that its own text names, since by that
text and what it names Triton knows a compiled kernel again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..triton.hopper_language import wait_for_inputs
from .hopper_common import Piece, next_piece, part_of, publish_sums, store_columns
from .hopper_merge import clear_inert, count_piece, ends_of_part, merge_splits


@gluon.jit
def new_spread(TILE: gl.constexpr):
    """[TILE rows, 64 keys] float32, swizzled so that neither the MMA's columns nor the rows meet in a bank."""
    return gl.allocate_shared_memory(gl.float32, [TILE, 64], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))


@gluon.jit
def by_rows(raw, spread, key):
    """[64 keys, rows] in the MMA's layout → [rows, 64 keys] in the softmax's, of which `key` is a slice."""
    spread.permute((1, 0)).store(raw)
    return spread.load(key.type.layout.parent)


@gluon.jit
def scores(score_page: gl.constexpr, q_scale, lse, queries, pages, spread, probabilities, sums, work, scale_log2,
           HEADS: gl.constexpr, ROWS: gl.constexpr, PLACES: gl.constexpr, TILE: gl.constexpr, PAGES: gl.constexpr,
           EARLY: gl.constexpr):  # fmt: skip
    """`score_page` waits for a page in the ring of PLACES, sets it free again, and gives its logits to `softmax_page`. q_scale:
    of the queries; None where they have none."""
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, 1)
    # A row's keys are in eight lanes of a warp.
    SOFT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, TILE, gl.SliceLayout(1, SOFT))
    key = gl.arange(0, 64, gl.SliceLayout(0, SOFT))
    step = 0
    piece = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            factor = scale_log2
            if q_scale is not None:
                factor = gl.load(q_scale + sequence * ROWS + row, mask=row < ROWS, other=0.0) * scale_log2
            least = keys - ROWS // HEADS + 1
            visible = least + row // HEADS
            top = gl.full([TILE], -1.0e30, gl.float32, gl.SliceLayout(1, SOFT))
            total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, SOFT))
            mbarrier.wait(queries.full, piece & 1)
            for index in range(first, last):
                top, total = score_page(queries, pages, step, spread, factor, least - index * 64, visible - index * 64, key,
                                        top, total, probabilities, PLACES, TILE)  # fmt: skip
                step += 1
            mbarrier.arrive(queries.empty, count=1)
            here = Piece(part, sequence, first, last, keys, piece)
            publish_sums(sums, lse, top, total, here, row, ROWS, TILE)
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys


@gluon.jit
def factors(probabilities, buffer, sums):
    """[1, rows]: what `sums` so far, [columns, rows], are multiplied by."""
    alphas = probabilities.alphas.index(buffer).slice(0, sums.shape[1], dim=0)
    return alphas.load(gl.SliceLayout(0, sums.type.layout))[None, :]


@gluon.jit
def _write_columns(results, left, right, sums, piece, row, column, ROWS: gl.constexpr):
    """As `hopper_common.write_piece`, of [columns, rows]."""
    mbarrier.wait(sums.full, piece.number & 1)
    factor = sums.inverse.slice(0, row.shape[0], dim=0).load(row.type.layout)[None, :]
    mbarrier.arrive(sums.empty, count=1)
    store_columns(results, left * factor, right * factor, piece, row, column, ROWS)


@gluon.jit
def values(add_page: gl.constexpr, results, pages, wide, probabilities, sums, work, HALF: gl.constexpr, ROWS: gl.constexpr,
           PLACES: gl.constexpr, TILE: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr,
           MERGE: gl.constexpr):  # fmt: skip
    """`add_page` waits for a page in the ring of PLACES and for its probabilities, adds 2 × 128 columns of values times these,
    and sets both free again. `wide`: buffers of its own."""
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, 1)
    if MERGE:
        ends = ends_of_part(work, begin, end)
        clear_inert(results.out, work, 1, ROWS, HALF)
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    row = gl.arange(0, TILE, gl.SliceLayout(0, OUT))
    column = HALF * 256 + gl.arange(0, 128, gl.SliceLayout(1, OUT))
    step = 0
    piece = 0
    before_a = 0
    before_b = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            left = gl.zeros([128, TILE], gl.float32, OUT)
            right = gl.zeros([128, TILE], gl.float32, OUT)
            for _ in range(first, last):
                left, right = add_page(left, right, pages, wide, probabilities, step, HALF, PLACES)
                step += 1
            here = Piece(part, sequence, first, last, keys, piece)
            _write_columns(results, left, right, sums, here, row, column, ROWS)
            if MERGE:
                before_b = count_piece(work, here, 1, HALF)
                if sequence == begin:
                    before_a = before_b
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys
    if MERGE:
        merge_splits(results, work, part, begin, end, ends, before_a, before_b, ROWS, 1, HALF)
