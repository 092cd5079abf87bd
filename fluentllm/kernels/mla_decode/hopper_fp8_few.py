"""MLA decode over the FP8 cache on Hopper for up to 16 rows, operands swapped: keys, and columns of the output, on the MMA's M.

An MMA's M is 64 rows whether they are used or not, its N any multiple of 8: S^T = K Q^T and O^T = V^T P^T take a quarter of the
time of `hopper_fp8` for 16 rows, and the output is spread over all warps, so scaling and storing it does too. V needs no
transpose here either: 16-bit WGMMA also takes its first operand as it lies, columns first. Queries come by TMA.

All of a page's V is converted before its probabilities are awaited: with few rows memory sets the pace, and the page is free
again sooner, the last one's output ready earlier. Otherwise as `hopper_fp8`: its loader, softmax, conversion and order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton.hopper_language import launch_dependents, wait_for_inputs
from .hopper_common import (
    Pages,
    Piece,
    Probabilities,
    Queries,
    Results,
    Sums,
    Work,
    half_page_buffers,
    handshakes,
    next_piece,
    part_of,
    probability_handshakes,
    publish_sums,
    store_columns,
)
from .hopper_fp8 import convert, loader, softmax_page
from .hopper_merge import clear_inert, count_piece, ends_of_part, merge_splits


@gluon.jit
def _raw_scores(queries, pages, stage, zero8, zeror):
    """K Q^T of one page, [64 keys, rows], unscaled. Two accumulators: FP8 and BF16 products have different types of layout."""
    s8 = zero8
    for panel in gl.static_range(4):
        keys = pages.content.index(stage * 4 + panel).reshape([64, 128])
        s8 = warpgroup_mma(keys, queries.content.index(panel).permute((1, 0)), s8, use_acc=panel > 0, is_async=True)
    sr = warpgroup_mma(
        pages.rope.index(stage).reshape([64, 64]), queries.rope.permute((1, 0)), zeror, use_acc=False, is_async=True
    )
    s8, sr = warpgroup_mma_wait(0, deps=[s8, sr])
    return s8 + gl.convert_layout(sr, zero8.type.layout)


@gluon.jit
def _scores(q_scale, lse, queries, pages, spread, probabilities, sums, work, scale_log2, HEADS: gl.constexpr,
            ROWS: gl.constexpr, NUM_STAGES: gl.constexpr, TILE: gl.constexpr, PAGES: gl.constexpr,
            EARLY: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, 1)
    S8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    SR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    # Turned on the way through shared memory, so that a row's keys are in eight lanes of a warp.
    SOFT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, TILE, gl.SliceLayout(1, SOFT))
    key = gl.arange(0, 64, gl.SliceLayout(0, SOFT))
    zero8 = gl.zeros([64, TILE], gl.float32, S8)
    zeror = gl.zeros([64, TILE], gl.float32, SR)
    step = 0
    piece = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            factor = gl.load(q_scale + sequence * ROWS + row, mask=row < ROWS, other=0.0) * scale_log2
            least = keys - ROWS // HEADS + 1
            visible = least + row // HEADS
            top = gl.full([TILE], -1.0e30, gl.float32, gl.SliceLayout(1, SOFT))
            total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, SOFT))
            mbarrier.wait(queries.full, piece & 1)
            for index in range(first, last):
                stage = step % NUM_STAGES
                mbarrier.wait(pages.full.index(stage), (step // NUM_STAGES) & 1)
                raw = _raw_scores(queries, pages, stage, zero8, zeror)
                bits = pages.scale.index(stage).reshape([64]).load(gl.SliceLayout(0, SOFT)).to(gl.int32, bitcast=True)
                mbarrier.arrive(pages.empty.index(stage), count=1)
                spread.permute((1, 0)).store(raw)
                raw = spread.load(SOFT)
                top, total = softmax_page(raw, bits, factor, least - index * 64, visible - index * 64, key, top, total,
                                          probabilities, step, TILE)  # fmt: skip
                step += 1
            mbarrier.arrive(queries.empty, count=1)
            here = Piece(part, sequence, first, last, keys, piece)
            publish_sums(sums, lse, top, total, here, row, ROWS, TILE)
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys


@gluon.jit
def _write_columns(results, left, right, sums, piece, row, column, ROWS: gl.constexpr):
    """As `hopper_common.write_piece`, of [columns, rows]."""
    mbarrier.wait(sums.full, piece.number & 1)
    factor = sums.inverse.slice(0, row.shape[0], dim=0).load(row.type.layout)[None, :]
    mbarrier.arrive(sums.empty, count=1)
    store_columns(results, left * factor, right * factor, piece, row, column, ROWS)


@gluon.jit
def _values(results, pages, v00, v01, v10, v11, probabilities, sums, work, HALF: gl.constexpr, ROWS: gl.constexpr,
            NUM_STAGES: gl.constexpr, TILE: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr,
            MERGE: gl.constexpr):  # fmt: skip
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
                stage = step % NUM_STAGES
                buffer = step % 2
                mbarrier.wait(pages.full.index(stage), (step // NUM_STAGES) & 1)
                convert(pages, v00, v01, stage, HALF, 0)
                convert(pages, v10, v11, stage, HALF, 1)
                fence_async_shared()
                mbarrier.arrive(pages.empty.index(stage), count=1)
                mbarrier.wait(probabilities.full.index(buffer), (step // 2) & 1)
                alpha = probabilities.alphas.index(buffer).slice(0, TILE, dim=0).load(gl.SliceLayout(0, OUT))
                left = left * alpha[None, :]
                right = right * alpha[None, :]
                early = probabilities.p.index(buffer).slice(0, 32, dim=1).permute((1, 0))
                late = probabilities.p.index(buffer).slice(32, 32, dim=1).permute((1, 0))
                left = warpgroup_mma(v00.permute((1, 0)), early, left, is_async=True)
                right = warpgroup_mma(v01.permute((1, 0)), early, right, is_async=True)
                left = warpgroup_mma(v10.permute((1, 0)), late, left, is_async=True)
                right = warpgroup_mma(v11.permute((1, 0)), late, right, is_async=True)
                left, right = warpgroup_mma_wait(0, deps=[left, right])
                mbarrier.arrive(probabilities.empty.index(buffer), count=1)
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


@gluon.jit(do_not_specialize=["count", "parts"])
def decode_fp8_few(q8_desc, qr_desc, k8_desc, kr_desc, ks_desc, q_scale, out, partial, lse, page_table, lengths, starts, spans,
                   records, counters, count, parts, scale_log2, table_width, HEADS: gl.constexpr, ROWS: gl.constexpr,
                   NUM_STAGES: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr,
                   MAPS: gl.constexpr, MERGE: gl.constexpr):  # fmt: skip
    """Grid: parts programs. TILE: a multiple of 8, not less than ROWS. PAGES, EARLY, MAPS, MERGE: of `switches`."""
    q8 = gl.allocate_shared_memory(gl.float8e4nv, [4, TILE, 128], q8_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [TILE, 64], qr_desc.layout)
    k8 = gl.allocate_shared_memory(gl.float8e4nv, [NUM_STAGES * 4, 1, 64, 128], k8_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, 1, 64, 64], kr_desc.layout)
    ks = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, 64], ks_desc.layout)
    F16: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    v = half_page_buffers()
    p = gl.allocate_shared_memory(gl.float16, [2, TILE, 64], F16)
    # Swizzled so that neither the MMA's columns nor the rows meet in a bank.
    spread = gl.allocate_shared_memory(gl.float32, [TILE, 64], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    alphas = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    inverse = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    mapped, q_full, q_empty, l_full, l_empty, k_full, k_empty = handshakes(NUM_STAGES)
    p_full, p_empty = probability_handshakes()
    queries = Queries(q8, qr, q_full, q_empty)
    pages = Pages(k8, kr, ks, k_full, k_empty)
    probabilities = Probabilities(p, alphas, p_full, p_empty)
    sums = Sums(inverse, l_full, l_empty)
    results = Results(out, partial, lse)
    work = Work(records, starts, lengths, spans, counters, count, parts, page_table, table_width)
    if PDL:
        launch_dependents()
    gl.warp_specialize(
        [
            (_scores, (q_scale, lse, queries, pages, spread, probabilities, sums, work, scale_log2, HEADS, ROWS, NUM_STAGES,
                       TILE, PAGES, EARLY)),
            (_values, (results, pages, v[0], v[1], v[2], v[3], probabilities, sums, work, 0, ROWS, NUM_STAGES, TILE, PAGES,
                       EARLY, MERGE)),
            (_values, (results, pages, v[4], v[5], v[6], v[7], probabilities, sums, work, 1, ROWS, NUM_STAGES, TILE, PAGES,
                       EARLY, MERGE)),
            (loader, (q8_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, work, ROWS, 1, TILE, True, PAGES,
                      EARLY, MAPS, NUM_STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
