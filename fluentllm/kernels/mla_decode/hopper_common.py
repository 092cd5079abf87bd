"""What the Hopper decode kernels have in common: what their partitions share, how they find their part of the plan, and how
they hand on its results."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..triton.hopper_language import barrier

RECORD: gl.constexpr = gl.constexpr(16)
"""Of `plan.RECORD`."""
PAGES_AT: gl.constexpr = gl.constexpr(8)
"""Of `plan.PAGES_AT`."""


class Work(NamedTuple):
    """The plan (`plan.DecodePlan`), as tensors in global memory."""

    records: Any
    starts: Any
    lengths: Any
    spans: Any
    counters: Any
    count: Any
    """Sequences."""
    parts: Any
    page_table: Any
    table_width: Any


class Results(NamedTuple):
    """In global memory: the output, and of pieces that others have splits of, normalised partial outputs and log-sum-exps."""

    out: Any
    partial: Any
    lse: Any


class Queries(NamedTuple):
    """Of a piece, in shared memory, and the barriers that say that they are there, and free again."""

    content: Any
    rope: Any
    full: Any
    empty: Any


class Pages(NamedTuple):
    """The ring of pages, or of their halves: latent, rotary part, scales; there, and free again."""

    content: Any
    rope: Any
    scale: Any
    full: Any
    empty: Any


class Probabilities(NamedTuple):
    """From the softmax to those who hold the output: [rows, keys], and the factor of what was summed before."""

    p: Any
    alphas: Any
    full: Any
    empty: Any


class Sums(NamedTuple):
    """Reciprocal sums of a piece's rows."""

    inverse: Any
    full: Any
    empty: Any


class Piece(NamedTuple):
    """A part's run of pages of one sequence."""

    part: Any
    sequence: Any
    first: Any
    last: Any
    """Page behind the last."""
    keys: Any
    """Of the whole sequence."""
    number: Any
    """Among the part's."""


@gluon.jit
def handshakes(PLACES: gl.constexpr, READERS: gl.constexpr):
    """Barriers between the partitions of a decode: the loader, the softmax, and the two that hold the output. → one for the
    tensor maps' first use; two each, there and free again, for queries, reciprocal sums, and each place in the ring of pages,
    which so many partitions read."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    l_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    l_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    mapped = gl.allocate_shared_memory(gl.int64, [1], BAR)
    mbarrier.init(mapped, count=1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=1)
    mbarrier.init(l_full, count=1)
    mbarrier.init(l_empty, count=2)
    for i in gl.static_range(PLACES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=READERS)
    return mapped, q_full, q_empty, l_full, l_empty, k_full, k_empty


@gluon.jit
def half_page_buffers():
    """V of 32 keys × 128 values, float16, as the two partitions that hold the output convert it: four of each. Buffers of their
    own: the compiler puts barriers between accesses to one buffer."""
    F16: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return (
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
        gl.allocate_shared_memory(gl.float16, [32, 128], F16),
    )


@gluon.jit
def probability_handshakes(BUFFERS: gl.constexpr):
    """Barriers of the buffers of probabilities: there, and free again."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    p_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BAR)
    p_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BAR)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=2)
    return p_full, p_empty


@gluon.jit
def part_of(work, GROUPS: gl.constexpr):
    """This CTA's part: number, sequences [begin, end), its end on the axis of work, and its first piece."""
    part = gl.program_id(0) // GROUPS
    record = work.records + part * RECORD
    return (part, gl.load(record), gl.load(record + 1), gl.load(record + 2), gl.load(record + 3), gl.load(record + 4),
            gl.load(record + 5))  # fmt: skip


@gluon.jit
def next_piece(work, sequence, end, high, AHEAD: gl.constexpr):
    """First and last + 1 page, and keys, of the next sequence's piece: only a part's first piece starts inside its sequence.
    AHEAD: nothing is loaded where there is none, since it would be waited for at once."""
    if AHEAD:
        last = 0
        keys = 0
        if sequence + 1 < end:
            keys = gl.load(work.lengths + sequence + 1)
            last = gl.minimum((keys + 63) // 64, high - gl.load(work.starts + sequence + 1))
        return 0, last, keys
    following = gl.minimum(sequence + 1, end - 1)
    keys = gl.load(work.lengths + following)
    return 0, gl.minimum((keys + 63) // 64, high - gl.load(work.starts + following)), keys


@gluon.jit
def page_number(work, table, piece, first, index, GROUPS: gl.constexpr, PAGES: gl.constexpr):
    """Of page `index` of a sequence. PAGES: so many of a part's first piece are in its record."""
    place = table + index
    if PAGES > 0:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
        if (piece == 0) & (index - first < PAGES):
            place = work.records + (gl.program_id(0) // GROUPS * RECORD + PAGES_AT + index - first)
    return gl.load(place)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def row_max(x):
    """[64, 64] in the scores' layout → [64]. In two steps: one chain of sixteen dependent instructions a row would set the
    pace of a partition that has one warp a scheduler."""
    return gl.convert_layout(gl.max(gl.max(x.reshape([64, 8, 8]), 1), 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def row_sum(x):
    """Like `row_max`."""
    return gl.convert_layout(gl.sum(gl.sum(x.reshape([64, 8, 8]), 1), 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def softmax_page(logits, reciprocal, top, total, probabilities, step, TILE: gl.constexpr, BUFFERS: gl.constexpr):
    """Online softmax of a page's logits, [TILE rows, 64 keys] in log2 units. `reciprocal`: of the keys' scales, where their
    logarithms are in the logits; None, where keys have none. → the rows' new maxima and sums."""
    if TILE == 64:
        new_top = gl.maximum(top, row_max(logits))
    else:
        new_top = gl.maximum(top, gl.max(logits, 1))
    alpha = exp2(top - new_top)
    prob = exp2(logits - new_top[:, None])
    share = prob
    if reciprocal is not None:
        share = prob * reciprocal[None, :]
    if TILE == 64:
        total = total * alpha + row_sum(share)
    else:
        total = total * alpha + gl.sum(share, 1)
    buffer = step % BUFFERS
    mbarrier.wait(probabilities.empty.index(buffer), ((step // BUFFERS) & 1) ^ 1)
    probabilities.p.index(buffer).slice(0, TILE, dim=0).store(prob.to(probabilities.p.dtype))
    probabilities.alphas.index(buffer).slice(0, TILE, dim=0).store(alpha)
    fence_async_shared()
    mbarrier.arrive(probabilities.full.index(buffer), count=1)
    return new_top, total


@gluon.jit
def publish_sums(sums, lse, top, total, piece, row, ROWS: gl.constexpr, TILE: gl.constexpr):
    """End of a piece in the partition that keeps the softmax: log-sum-exps (log2 units) for whoever merges, if the sequence
    has other pieces, then reciprocal sums for the partitions that hold the output, which count this piece as finished."""
    if piece.last - piece.first < (piece.keys + 63) // 64:
        slot = 2 * piece.part + (piece.first == 0).to(gl.int32)
        gl.store(lse + slot * ROWS + row, gl.where(total > 0, top + gl.log2(total), float("-inf")), mask=row < ROWS)
    mbarrier.wait(sums.empty, (piece.number & 1) ^ 1)
    sums.inverse.slice(0, TILE, dim=0).store(gl.where(total > 0, 1.0 / total, 0.0))
    # All threads' log-sum-exps are written before the one that arrives says so.
    barrier()
    mbarrier.arrive(sums.full, count=1)


@gluon.jit
def write_piece(results, left, right, sums, piece, row, column, ROWS: gl.constexpr):
    """End of a piece in a partition that holds 2 × 128 columns of the output, from `column` on: normalise, then write them to
    the output, or to the piece's slot."""
    mbarrier.wait(sums.full, piece.number & 1)
    factor = sums.inverse.load(row.type.layout)[:, None]
    mbarrier.arrive(sums.empty, count=1)
    inside = (row < ROWS)[:, None]
    if piece.last - piece.first == (piece.keys + 63) // 64:
        target = results.out + (piece.sequence * ROWS + row).to(gl.int64)[:, None] * 512 + column[None, :]
        gl.store(target, (left * factor).to(results.out.dtype.element_ty), mask=inside)
        gl.store(target + 128, (right * factor).to(results.out.dtype.element_ty), mask=inside)
    else:
        slot = 2 * piece.part + (piece.first == 0).to(gl.int32)
        place = results.partial + (slot * ROWS + row).to(gl.int64)[:, None] * 512 + column[None, :]
        gl.store(place, left * factor, mask=inside)
        gl.store(place + 128, right * factor, mask=inside)


@gluon.jit
def store_columns(results, left, right, piece, row, column, ROWS: gl.constexpr):
    """2 × [128 columns, rows], normalised, to the output, or to the piece's slot."""
    inside = (row < ROWS)[None, :]
    if piece.last - piece.first == (piece.keys + 63) // 64:
        target = results.out + (piece.sequence * ROWS + row).to(gl.int64)[None, :] * 512 + column[:, None]
        gl.store(target, left.to(results.out.dtype.element_ty), mask=inside)
        gl.store(target + 128, right.to(results.out.dtype.element_ty), mask=inside)
    else:
        slot = 2 * piece.part + (piece.first == 0).to(gl.int32)
        place = results.partial + (slot * ROWS + row).to(gl.int64)[None, :] * 512 + column[:, None]
        gl.store(place, left, mask=inside)
        gl.store(place + 128, right, mask=inside)
