"""MLA decode over the BF16 cache on Hopper: the FP8 kernel's shape without its conversion.

A page is 64 tokens × 576 values; its first 512 are both what the queries meet and what is summed, so it is fetched once. The
same four partitions as in `hopper_fp8`: loader, scores, and two that hold 256 output columns each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import (
    PAGES_AT,
    RECORD,
    async_load,
    exp2,
    handshakes,
    launch_dependents,
    next_piece,
    page_number,
    part_of,
    publish_sums,
    row_max,
    row_sum,
    wait_for_inputs,
    write_piece,
)
from .hopper_merge import clear_inert, count_piece, ends_of_part, merge_splits

STAGES = 2


@gluon.jit
def _loader(q_desc, qr_desc, kv_desc, kr_desc, q, qr, k0, k1, kr, q_full, q_empty, k_full, k_empty, mapped, page_table, lengths,
            starts, records, ROWS: gl.constexpr, GROUPS: gl.constexpr, TABLE_WIDTH, PAGES: gl.constexpr, EARLY: gl.constexpr,
            MAPS: gl.constexpr, NUM_STAGES: gl.constexpr):  # fmt: skip
    if MAPS:
        # Used on places outside their tensors, where they give zeros.
        FAR: gl.constexpr = 1 << 30
        mbarrier.expect(mapped, 64 * 1152 + 64 * 640)
        async_load(q_desc, [FAR, 0], mapped, q)
        async_load(qr_desc, [FAR, 0], mapped, qr)
        async_load(kv_desc, [FAR, 0, 0], mapped, k0.index(0))
        async_load(kr_desc, [FAR, 0, 0], mapped, kr.index(0))
    wait_for_inputs(EARLY)
    _, begin, end, high, first, last, _ = part_of(records, GROUPS)
    group = gl.program_id(0) % GROUPS
    step = 0
    piece = 0
    page = 0
    if PAGES > 0:
        page = gl.load(records + gl.program_id(0) // GROUPS * RECORD + PAGES_AT)
    if MAPS:
        mbarrier.wait(mapped, 0)
    for sequence in range(begin, end):
        if PAGES == 0:
            next_first, next_last, _ = next_piece(starts, lengths, sequence, end, high, False)
        if first < last:
            row = sequence * ROWS + group * 64
            table = page_table + sequence * TABLE_WIDTH
            if PAGES == 0 or piece > 0:
                page = gl.load(table + first)
            mbarrier.wait(q_empty, (piece & 1) ^ 1)
            mbarrier.expect(q_full, 64 * 1152)
            async_load(q_desc, [row, 0], q_full, q)
            async_load(qr_desc, [row, 0], q_full, qr)
            for index in range(first, last):
                stage = step % NUM_STAGES
                following = page_number(records, table, piece, first, gl.minimum(index + 1, last - 1), GROUPS, PAGES)
                mbarrier.wait(k_empty.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
                full = k_full.index(stage)
                mbarrier.expect(full, 64 * 1152)
                async_load(kv_desc, [page, 0, 0], full, k0.index(stage))
                async_load(kv_desc, [page, 0, 256], full, k1.index(stage))
                async_load(kr_desc, [page, 0, 512], full, kr.index(stage))
                page = following
                step += 1
            piece += 1
        if PAGES > 0:
            next_first, next_last, _ = next_piece(starts, lengths, sequence, end, high, True)
        first = next_first
        last = next_last


@gluon.jit
def _scores(lse, q, qr, k0, k1, kr, p, alphas, inverse, q_full, q_empty, k_full, k_empty, p_full, p_empty, l_full, l_empty,
            lengths, starts, records, scale_log2, HEADS: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
            NUM_STAGES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(records, GROUPS)
    group = gl.program_id(0) % GROUPS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    key = gl.arange(0, 64, gl.SliceLayout(0, S))
    zero = gl.zeros([64, 64], gl.float32, S)
    step = 0
    piece = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(starts, lengths, sequence, end, high, PAGES > 0)
        if first < last:
            least = keys - ROWS // HEADS + 1
            visible = least + row // HEADS
            top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, S))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
            mbarrier.wait(q_full, piece & 1)
            for index in range(first, last):
                stage = step % NUM_STAGES
                mbarrier.wait(k_full.index(stage), (step // NUM_STAGES) & 1)
                left = k0.index(stage).reshape([64, 256]).permute((1, 0))
                right = k1.index(stage).reshape([64, 256]).permute((1, 0))
                raw = warpgroup_mma(q.slice(0, 256, dim=1), left, zero, use_acc=False, is_async=True)
                raw = warpgroup_mma(q.slice(256, 256, dim=1), right, raw, is_async=True)
                raw = warpgroup_mma(qr, kr.index(stage).reshape([64, 64]).permute((1, 0)), raw, is_async=True)
                raw = warpgroup_mma_wait(0, deps=[raw])
                mbarrier.arrive(k_empty.index(stage), count=1)
                # The bounds also drop NaN (the other operand is returned): products of huge inputs may overflow.
                logit = gl.minimum(gl.maximum(raw * scale_log2, -1.0e29), 1.0e29)
                if (index + 1) * 64 > least:
                    logit = gl.where((index * 64 + key)[None, :] < visible[:, None], logit, float("-inf"))
                new_top = gl.maximum(top, row_max(logit))
                alpha = exp2(top - new_top)
                prob = exp2(logit - new_top[:, None])
                top = new_top
                total = total * alpha + row_sum(prob)
                mbarrier.wait(p_empty, (step & 1) ^ 1)
                p.store(prob.to(gl.bfloat16))
                alphas.store(alpha)
                fence_async_shared()
                mbarrier.arrive(p_full, count=1)
                step += 1
            mbarrier.arrive(q_empty, count=1)
            publish_sums(inverse, lse, l_full, l_empty, top, total, part, first, last, keys, row, piece, ROWS, 64)
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys


@gluon.jit
def _values(out, partial, lse, v, p, alphas, inverse, k_full, k_empty, p_full, p_empty, l_full, l_empty, lengths, starts, spans,
            records, counters, count, parts, HALF: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
            NUM_STAGES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MERGE: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(records, GROUPS)
    if MERGE:
        first_a, splits_a, first_b, splits_b = ends_of_part(spans, begin, end, count)
        clear_inert(out, lengths, count, parts, GROUPS, ROWS, HALF)
    group = gl.program_id(0) % GROUPS
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    column = HALF * 256 + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    step = 0
    piece = 0
    before_a = 0
    before_b = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(starts, lengths, sequence, end, high, PAGES > 0)
        if first < last:
            left = gl.zeros([64, 128], gl.float32, OUT)
            right = gl.zeros([64, 128], gl.float32, OUT)
            for _ in range(first, last):
                stage = step % NUM_STAGES
                mbarrier.wait(k_full.index(stage), (step // NUM_STAGES) & 1)
                mbarrier.wait(p_full, step & 1)
                alpha = alphas.load(gl.SliceLayout(1, OUT))
                value = v.index(stage).reshape([64, 256])
                left = left * alpha[:, None]
                right = right * alpha[:, None]
                left = warpgroup_mma(p, value.slice(0, 128, dim=1), left, is_async=True)
                right = warpgroup_mma(p, value.slice(128, 128, dim=1), right, is_async=True)
                left, right = warpgroup_mma_wait(0, deps=[left, right])
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.arrive(p_empty, count=1)
                step += 1
            write_piece(out, partial, left, right, inverse, l_full, l_empty, part, sequence, first, last, keys, row, column,
                        piece, ROWS)  # fmt: skip
            if MERGE:
                before_b = count_piece(counters, sequence, first, last, keys, GROUPS, HALF)
                if sequence == begin:
                    before_a = before_b
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys
    if MERGE:
        merge_splits(out, partial, lse, counters, part, begin, end, first_a, splits_a, first_b, splits_b, before_a, before_b,
                     ROWS, GROUPS, HALF)  # fmt: skip


@gluon.jit(do_not_specialize=["count", "parts"])
def decode_bf16(q_desc, qr_desc, kv_desc, kr_desc, out, partial, lse, page_table, lengths, starts, spans, records, counters,
                count, parts, scale_log2, table_width, HEADS: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
                NUM_STAGES: gl.constexpr, PDL: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MAPS: gl.constexpr,
                MERGE: gl.constexpr):  # fmt: skip
    """Grid: parts × groups programs, the groups of a part side by side so that they share its pages in L2. PAGES, EARLY, MAPS,
    MERGE: of `switches`."""
    q = gl.allocate_shared_memory(gl.bfloat16, [64, 512], q_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [64, 64], qr_desc.layout)
    k0 = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, 1, 64, 256], kv_desc.layout)
    k1 = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, 1, 64, 256], kv_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, 1, 64, 64], kr_desc.layout)
    # One buffer: queries and two pages fill the rest.
    p = gl.allocate_shared_memory(gl.bfloat16, [64, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    alphas = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    inverse = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    mapped, q_full, q_empty, l_full, l_empty, k_full, k_empty = handshakes(NUM_STAGES)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    p_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    p_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=2)
    if PDL:
        launch_dependents()
    gl.warp_specialize(
        [
            (_scores, (lse, q, qr, k0, k1, kr, p, alphas, inverse, q_full, q_empty, k_full, k_empty, p_full, p_empty, l_full,
                       l_empty, lengths, starts, records, scale_log2, HEADS, ROWS, GROUPS, NUM_STAGES, PAGES, EARLY)),
            (_values, (out, partial, lse, k0, p, alphas, inverse, k_full, k_empty, p_full, p_empty, l_full, l_empty, lengths,
                       starts, spans, records, counters, count, parts, 0, ROWS, GROUPS, NUM_STAGES, PAGES, EARLY, MERGE)),
            (_values, (out, partial, lse, k1, p, alphas, inverse, k_full, k_empty, p_full, p_empty, l_full, l_empty, lengths,
                       starts, spans, records, counters, count, parts, 1, ROWS, GROUPS, NUM_STAGES, PAGES, EARLY, MERGE)),
            (_loader, (q_desc, qr_desc, kv_desc, kr_desc, q, qr, k0, k1, kr, q_full, q_empty, k_full, k_empty, mapped,
                       page_table, lengths, starts, records, ROWS, GROUPS, table_width, PAGES, EARLY, MAPS, NUM_STAGES)),
        ],
        [4, 4, 1],
        [168, 168, 24],
    )  # fmt: skip
