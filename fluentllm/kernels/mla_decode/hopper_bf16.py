"""MLA decode over the BF16 cache on Hopper: the FP8 kernel's shape without its conversion.

A page is 64 tokens × 576 values; its first 512 are both what the queries meet and what is summed, so it is fetched once. The
same four partitions as in `hopper_fp8`: loader, scores, and two that hold 256 output columns each.

The ring's places hold halves of pages, 256 columns each: the first half is multiplied while the second is on its way, and each
is free again when its columns are summed. The rotary part comes and goes with the second half.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..triton.hopper_language import async_load, launch_dependents, wait_for_inputs
from .hopper_common import (
    PAGES_AT,
    RECORD,
    Pages,
    Piece,
    Probabilities,
    Queries,
    Results,
    Sums,
    Work,
    handshakes,
    next_piece,
    page_number,
    part_of,
    probability_handshakes,
    publish_sums,
    softmax_page,
    write_piece,
)
from .hopper_merge import clear_inert, count_piece, ends_of_part, merge_splits

HALVES = 4
"""Of pages in the ring."""


@gluon.jit
def place_of(step, HALF: gl.constexpr, HALVES: gl.constexpr):
    """Of a half of the part's page number `step` → its place in the ring, and the parity of that place's use."""
    number = 2 * step + HALF
    return number % HALVES, (number // HALVES) & 1


@gluon.jit
def loader(q_desc, qr_desc, kv_desc, kr_desc, queries, pages, mapped, work, ROWS: gl.constexpr, GROUPS: gl.constexpr,
           TILE: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MAPS: gl.constexpr, HALVES: gl.constexpr):  # fmt: skip
    """There are HALVES // 2 places for rotary parts, without barriers of their own. A rotary part is there with its page's
    second half; and this half's place, like its own, was last that of the page HALVES // 2 before, which is scored by the time
    that place is free."""
    if MAPS:
        # Used on places outside their tensors, where they give zeros.
        FAR: gl.constexpr = 1 << 30
        mbarrier.expect(mapped, TILE * 1152 + 64 * 640)
        async_load(q_desc, [FAR, 0], mapped, queries.content)
        async_load(qr_desc, [FAR, 0], mapped, queries.rope)
        async_load(kv_desc, [FAR, 0, 0], mapped, pages.content.index(0))
        async_load(kr_desc, [FAR, 0, 0], mapped, pages.rope.index(0))
    wait_for_inputs(EARLY)
    _, begin, end, high, first, last, _ = part_of(work, GROUPS)
    group = gl.program_id(0) % GROUPS
    step = 0
    piece = 0
    page = 0
    if PAGES > 0:
        page = gl.load(work.records + gl.program_id(0) // GROUPS * RECORD + PAGES_AT)
    if MAPS:
        mbarrier.wait(mapped, 0)
    for sequence in range(begin, end):
        if PAGES == 0:
            next_first, next_last, _ = next_piece(work, sequence, end, high, False)
        if first < last:
            row = sequence * ROWS + group * 64
            table = work.page_table + sequence * work.table_width
            if PAGES == 0 or piece > 0:
                page = gl.load(table + first)
            mbarrier.wait(queries.empty, (piece & 1) ^ 1)
            mbarrier.expect(queries.full, TILE * 1152)
            async_load(q_desc, [row, 0], queries.full, queries.content)
            async_load(qr_desc, [row, 0], queries.full, queries.rope)
            for index in range(first, last):
                following = page_number(work, table, piece, first, gl.minimum(index + 1, last - 1), GROUPS, PAGES)
                for half in gl.static_range(2):
                    place, parity = place_of(step, half, HALVES)
                    mbarrier.wait(pages.empty.index(place), parity ^ 1)
                    full = pages.full.index(place)
                    mbarrier.expect(full, 64 * (512 + 128 * half))
                    async_load(kv_desc, [page, 0, 256 * half], full, pages.content.index(place))
                    if half == 1:
                        async_load(kr_desc, [page, 0, 512], full, pages.rope.index(step % (HALVES // 2)))
                page = following
                step += 1
            piece += 1
        if PAGES > 0:
            next_first, next_last, _ = next_piece(work, sequence, end, high, True)
        first = next_first
        last = next_last


@gluon.jit
def bounded_logits(raw, scale_log2, hidden_from, visible, key):
    """Logits in log2 units, -inf of keys that a row may not see. The bounds also drop NaN (the other operand is returned):
    products of huge inputs may overflow."""
    logits = gl.minimum(gl.maximum(raw * scale_log2, -1.0e29), 1.0e29)
    if hidden_from < 64:
        logits = gl.where(key[None, :] < visible[:, None], logits, float("-inf"))
    return logits


@gluon.jit
def _raw_scores(queries, pages, step, zero, HALVES: gl.constexpr):
    """Q K^T of one page, unscaled."""
    left, left_parity = place_of(step, 0, HALVES)
    right, right_parity = place_of(step, 1, HALVES)
    rope = pages.rope.index(step % (HALVES // 2)).reshape([64, 64]).permute((1, 0))
    mbarrier.wait(pages.full.index(left), left_parity)
    keys = pages.content.index(left).reshape([64, 256]).permute((1, 0))
    raw = warpgroup_mma(queries.content.slice(0, 256, dim=1), keys, zero, use_acc=False, is_async=True)
    mbarrier.wait(pages.full.index(right), right_parity)
    keys = pages.content.index(right).reshape([64, 256]).permute((1, 0))
    raw = warpgroup_mma(queries.content.slice(256, 256, dim=1), keys, raw, is_async=True)
    raw = warpgroup_mma(queries.rope, rope, raw, is_async=True)
    raw = warpgroup_mma_wait(0, deps=[raw])
    mbarrier.arrive(pages.empty.index(left), count=1)
    mbarrier.arrive(pages.empty.index(right), count=1)
    return raw


@gluon.jit
def _scores(lse, queries, pages, probabilities, sums, work, scale_log2, HEADS: gl.constexpr, ROWS: gl.constexpr,
            GROUPS: gl.constexpr, HALVES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, GROUPS)
    group = gl.program_id(0) % GROUPS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    key = gl.arange(0, 64, gl.SliceLayout(0, S))
    zero = gl.zeros([64, 64], gl.float32, S)
    step = 0
    piece = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            least = keys - ROWS // HEADS + 1
            visible = least + row // HEADS
            top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, S))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
            mbarrier.wait(queries.full, piece & 1)
            for index in range(first, last):
                raw = _raw_scores(queries, pages, step, zero, HALVES)
                logits = bounded_logits(raw, scale_log2, least - index * 64, visible - index * 64, key)
                top, total = softmax_page(logits, None, top, total, probabilities, step, 64, 1)
                step += 1
            mbarrier.arrive(queries.empty, count=1)
            here = Piece(part, sequence, first, last, keys, piece)
            publish_sums(sums, lse, top, total, here, row, ROWS, 64)
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys


@gluon.jit
def _values(results, pages, probabilities, sums, work, HALF: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
            HALVES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MERGE: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, GROUPS)
    if MERGE:
        ends = ends_of_part(work, begin, end)
        clear_inert(results.out, work, GROUPS, ROWS, HALF)
    group = gl.program_id(0) % GROUPS
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    column = HALF * 256 + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    step = 0
    piece = 0
    before_a = 0
    before_b = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            left = gl.zeros([64, 128], gl.float32, OUT)
            right = gl.zeros([64, 128], gl.float32, OUT)
            for _ in range(first, last):
                place, parity = place_of(step, HALF, HALVES)
                mbarrier.wait(pages.full.index(place), parity)
                mbarrier.wait(probabilities.full.index(0), step & 1)
                alpha = probabilities.alphas.index(0).load(gl.SliceLayout(1, OUT))
                prob = probabilities.p.index(0)
                value = pages.content.index(place).reshape([64, 256])
                left = left * alpha[:, None]
                right = right * alpha[:, None]
                left = warpgroup_mma(prob, value.slice(0, 128, dim=1), left, is_async=True)
                right = warpgroup_mma(prob, value.slice(128, 128, dim=1), right, is_async=True)
                left, right = warpgroup_mma_wait(0, deps=[left, right])
                mbarrier.arrive(pages.empty.index(place), count=1)
                mbarrier.arrive(probabilities.empty.index(0), count=1)
                step += 1
            here = Piece(part, sequence, first, last, keys, piece)
            write_piece(results, left, right, sums, here, row, column, ROWS)
            if MERGE:
                before_b = count_piece(work, here, GROUPS, HALF)
                if sequence == begin:
                    before_a = before_b
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys
    if MERGE:
        merge_splits(results, work, part, begin, end, ends, before_a, before_b, ROWS, GROUPS, HALF)


@gluon.jit(do_not_specialize=["count", "parts"])
def decode_bf16(q_desc, qr_desc, kv_desc, kr_desc, out, partial, lse, page_table, lengths, starts, spans, records, counters,
                count, parts, scale_log2, table_width, HEADS: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
                HALVES: gl.constexpr, PDL: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MAPS: gl.constexpr,
                MERGE: gl.constexpr):  # fmt: skip
    """Grid: parts × groups programs, the groups of a part side by side so that they share its pages in L2. PAGES, EARLY, MAPS,
    MERGE: of `switches`."""
    q = gl.allocate_shared_memory(gl.bfloat16, [64, 512], q_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [64, 64], qr_desc.layout)
    kv = gl.allocate_shared_memory(gl.bfloat16, [HALVES, 1, 64, 256], kv_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [HALVES // 2, 1, 64, 64], kr_desc.layout)
    # One buffer: queries and two pages fill the rest.
    p = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    alphas = gl.allocate_shared_memory(gl.float32, [1, 64], FLAT)
    inverse = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    mapped, q_full, q_empty, l_full, l_empty, k_full, k_empty = handshakes(HALVES, 2)
    p_full, p_empty = probability_handshakes(1)
    queries = Queries(q, qr, q_full, q_empty)
    pages = Pages(kv, kr, None, k_full, k_empty)
    probabilities = Probabilities(p, alphas, p_full, p_empty)
    sums = Sums(inverse, l_full, l_empty)
    results = Results(out, partial, lse)
    work = Work(records, starts, lengths, spans, counters, count, parts, page_table, table_width)
    if PDL:
        launch_dependents()
    gl.warp_specialize(
        [
            (_scores, (lse, queries, pages, probabilities, sums, work, scale_log2, HEADS, ROWS, GROUPS, HALVES, PAGES, EARLY)),
            (_values, (results, pages, probabilities, sums, work, 0, ROWS, GROUPS, HALVES, PAGES, EARLY, MERGE)),
            (_values, (results, pages, probabilities, sums, work, 1, ROWS, GROUPS, HALVES, PAGES, EARLY, MERGE)),
            (loader, (q_desc, qr_desc, kv_desc, kr_desc, queries, pages, mapped, work, ROWS, GROUPS, 64, PAGES, EARLY, MAPS,
                      HALVES)),
        ],
        [4, 4, 1],
        [168, 168, 24],
    )  # fmt: skip
