"""MLA decode over the FP8 cache on Hopper: one persistent, warp-specialised Gluon kernel.

A CTA owns one part of the plan (a run of KV pages, possibly of several sequences) and one group of 64 query rows. Four
partitions pass pages along shared memory:

    loader (1 warp)      TMA: queries once a piece, one KV page (latent, scales, rotary) a stage
    scores (4 warps)     S = Q K^T: FP8 WGMMA over the latent, BF16 WGMMA over the rotary part; online softmax; P → FP16
    values × 2 (4 warps) each converts its 256 latent values E4M3 → FP16 (exact), then O += P V with FP16 WGMMA

V needs no transpose because 16-bit WGMMA reads it as it lies. A token's scale s enters the exponent: with
t = s_logit + log2 s, P' = 2^(t - max t) ≤ 1 is what multiplies the raw E4M3 values, so P' never leaves FP16's range.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
    half_page_buffers,
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

STAGES = 3


@gluon.jit
def fetch_maps(q_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, TILE: gl.constexpr, SWAP: gl.constexpr):
    """Use all tensor maps on places outside their tensors, where they give zeros."""
    FAR: gl.constexpr = 1 << 30
    mbarrier.expect(mapped, 64 * 260 + TILE * (256 if SWAP else 128))
    async_load(k8_desc, [FAR, 0, 0], mapped, pages.content.index(0))
    async_load(kr_desc, [FAR, 0, 0], mapped, pages.rope.index(0))
    async_load(ks_desc, [FAR, 0], mapped, pages.scale.index(0))
    async_load(qr_desc, [FAR, 0], mapped, queries.rope)
    if SWAP:
        async_load(q_desc, [FAR, 0], mapped, queries.content.index(0))


@gluon.jit
def loader(q_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, work, ROWS: gl.constexpr, GROUPS: gl.constexpr,
           TILE: gl.constexpr, SWAP: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MAPS: gl.constexpr,
           NUM_STAGES: gl.constexpr):  # fmt: skip
    """SWAP: the content of the queries comes this way too, by `q_desc`; otherwise that is not used."""
    if MAPS:
        fetch_maps(q_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, TILE, SWAP)
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
            mbarrier.expect(queries.full, TILE * (640 if SWAP else 128))
            async_load(qr_desc, [row, 0], queries.full, queries.rope)
            if SWAP:
                for panel in gl.static_range(4):
                    async_load(q_desc, [row, panel * 128], queries.full, queries.content.index(panel))
            for index in range(first, last):
                stage = step % NUM_STAGES
                following = page_number(work, table, piece, first, gl.minimum(index + 1, last - 1), GROUPS, PAGES)
                mbarrier.wait(pages.empty.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
                full = pages.full.index(stage)
                mbarrier.expect(full, 64 * 644)
                for panel in gl.static_range(4):
                    async_load(k8_desc, [page, 0, panel * 128], full, pages.content.index(stage * 4 + panel))
                async_load(kr_desc, [page, 0, 0], full, pages.rope.index(stage))
                async_load(ks_desc, [page, 0], full, pages.scale.index(stage))
                page = following
                step += 1
            piece += 1
        if PAGES > 0:
            next_first, next_last, _ = next_piece(work, sequence, end, high, True)
        first = next_first
        last = next_last


@gluon.jit
def _raw_scores(q0, q1, q2, q3, queries, pages, stage, zero8, zeror):
    """Q K^T of one page, unscaled. Two accumulators, since FP8 and BF16 products have different types of layout."""
    s8 = warpgroup_mma(
        q0, pages.content.index(stage * 4).reshape([64, 128]).permute((1, 0)), zero8, use_acc=False, is_async=True
    )
    s8 = warpgroup_mma(q1, pages.content.index(stage * 4 + 1).reshape([64, 128]).permute((1, 0)), s8, is_async=True)
    s8 = warpgroup_mma(q2, pages.content.index(stage * 4 + 2).reshape([64, 128]).permute((1, 0)), s8, is_async=True)
    s8 = warpgroup_mma(q3, pages.content.index(stage * 4 + 3).reshape([64, 128]).permute((1, 0)), s8, is_async=True)
    sr = warpgroup_mma(
        queries.rope, pages.rope.index(stage).reshape([64, 64]).permute((1, 0)), zeror, use_acc=False, is_async=True
    )
    s8, sr = warpgroup_mma_wait(0, deps=[s8, sr])
    return s8 + gl.convert_layout(sr, zero8.type.layout)


@gluon.jit
def weighted_logits(raw, scale_bits, factor, hidden_from, visible, key):
    """Logits and their keys' scales in log2 units, -inf of keys that a row may not see → these, and the scales' reciprocals.
    `scale_bits` are those of a power of two (its exponent gives log2, its negation the reciprocal); a page never written has
    zeros there, which masked keys survive."""
    k_scale = scale_bits.to(gl.float32, bitcast=True)
    log2_scale = ((scale_bits >> 23) | 0x4B000000).to(gl.float32, bitcast=True) - 8388735.0
    reciprocal = (0x7F000000 - scale_bits).to(gl.float32, bitcast=True)
    # Finite, since the quantisers bound the scales and the aligned rotary parts.
    weighted = raw * k_scale[None, :] * factor[:, None] + log2_scale[None, :]
    if hidden_from < 64:
        weighted = gl.where(key[None, :] < visible[:, None], weighted, float("-inf"))
    return weighted, reciprocal


@gluon.jit
def _scores(q8, q_scale, lse, queries, pages, spread, probabilities, sums, work, scale_log2, HEADS: gl.constexpr,
            ROWS: gl.constexpr, GROUPS: gl.constexpr, NUM_STAGES: gl.constexpr, TILE: gl.constexpr, PAGES: gl.constexpr,
            EARLY: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, GROUPS)
    group = gl.program_id(0) % GROUPS
    S8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    SR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # With few rows the MMA's layout would leave all of them to one or two warps, and every page would take as long as with 64:
    # they are spread over the four through shared memory.
    SOFT: gl.constexpr = S8 if TILE == 64 else gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = group * 64 + gl.arange(0, TILE, gl.SliceLayout(1, SOFT))
    key = gl.arange(0, 64, gl.SliceLayout(0, SOFT))
    # The content of the queries stays in registers: shared memory is what limits the depth of the ring of pages.
    A: gl.constexpr = gl.DotOperandLayout(0, S8, 4)
    q_row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, A))
    q_column = gl.arange(0, 128, gl.SliceLayout(0, A))
    zero8 = gl.zeros([64, 64], gl.float32, S8)
    zeror = gl.zeros([64, 64], gl.float32, SR)
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
            source = q8 + (sequence * ROWS + q_row).to(gl.int64)[:, None] * 512 + q_column[None, :]
            inside = (q_row < ROWS)[:, None]
            q0 = gl.load(source, mask=inside, other=0.0)
            q1 = gl.load(source + 128, mask=inside, other=0.0)
            q2 = gl.load(source + 256, mask=inside, other=0.0)
            q3 = gl.load(source + 384, mask=inside, other=0.0)
            mbarrier.wait(queries.full, piece & 1)
            for index in range(first, last):
                stage = step % NUM_STAGES
                mbarrier.wait(pages.full.index(stage), (step // NUM_STAGES) & 1)
                raw = _raw_scores(q0, q1, q2, q3, queries, pages, stage, zero8, zeror)
                bits = pages.scale.index(stage).reshape([64]).load(gl.SliceLayout(0, SOFT)).to(gl.int32, bitcast=True)
                mbarrier.arrive(pages.empty.index(stage), count=1)
                if TILE < 64:
                    spread.store(raw)
                    raw = spread.slice(0, TILE, dim=0).load(SOFT)
                weighted, reciprocal = weighted_logits(raw, bits, factor, least - index * 64, visible - index * 64, key)
                top, total = softmax_page(weighted, reciprocal, top, total, probabilities, step, TILE, 2)
                step += 1
            mbarrier.arrive(queries.empty, count=1)
            here = Piece(part, sequence, first, last, keys, piece)
            publish_sums(sums, lse, top, total, here, row, ROWS, TILE)
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys


@gluon.jit
def convert(pages, v_left, v_right, stage, HALF: gl.constexpr, KEYS_FROM: gl.constexpr):
    """Half a page's keys (32) of half the latent (2 × 128): E4M3 → FP16, exactly."""
    # Lanes so that neither the 16-byte reads of E4M3 nor the two 16-byte writes of FP16 meet in a bank of the 128-byte
    # swizzle: eight lanes are four chunks of a row and four of the row whose index differs in bits 0 and 2.
    LANES: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 64]],
        lane_bases=[[0, 16], [0, 32], [5, 0], [1, 0], [2, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 128],
    )
    left = pages.content.index(stage * 4 + HALF * 2).reshape([64, 128]).slice(KEYS_FROM * 32, 32, dim=0).load(LANES)
    right = pages.content.index(stage * 4 + HALF * 2 + 1).reshape([64, 128]).slice(KEYS_FROM * 32, 32, dim=0).load(LANES)
    v_left.store(left.to(gl.float16))
    v_right.store(right.to(gl.float16))


@gluon.jit
def _values(results, pages, v00, v01, v10, v11, probabilities, sums, work, HALF: gl.constexpr, ROWS: gl.constexpr,
            GROUPS: gl.constexpr, NUM_STAGES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr,
            MERGE: gl.constexpr):  # fmt: skip
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
            mbarrier.wait(pages.full.index(step % NUM_STAGES), (step // NUM_STAGES) & 1)
            convert(pages, v00, v01, step % NUM_STAGES, HALF, 0)
            for index in range(first, last):
                stage = step % NUM_STAGES
                buffer = step % 2
                mbarrier.wait(probabilities.full.index(buffer), (step // 2) & 1)
                alpha = probabilities.alphas.index(buffer).load(gl.SliceLayout(1, OUT))
                left = left * alpha[:, None]
                right = right * alpha[:, None]
                fence_async_shared()
                prob = probabilities.p.index(buffer)
                left = warpgroup_mma(prob.slice(0, 32, dim=1), v00, left, is_async=True)
                right = warpgroup_mma(prob.slice(0, 32, dim=1), v01, right, is_async=True)
                convert(pages, v10, v11, stage, HALF, 1)
                fence_async_shared()
                left = warpgroup_mma(prob.slice(32, 32, dim=1), v10, left, is_async=True)
                right = warpgroup_mma(prob.slice(32, 32, dim=1), v11, right, is_async=True)
                mbarrier.arrive(pages.empty.index(stage), count=1)
                step += 1
                # The first keys' V is free again; convert the next page's under the second product.
                left, right = warpgroup_mma_wait(2, deps=[left, right])
                if index + 1 < last:
                    mbarrier.wait(pages.full.index(step % NUM_STAGES), (step // NUM_STAGES) & 1)
                    convert(pages, v00, v01, step % NUM_STAGES, HALF, 0)
                left, right = warpgroup_mma_wait(0, deps=[left, right])
                mbarrier.arrive(probabilities.empty.index(buffer), count=1)
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
def decode_fp8(q8, qr_desc, k8_desc, kr_desc, ks_desc, q_scale, out, partial, lse, page_table, lengths, starts, spans,
               records, counters, count, parts, scale_log2, table_width, HEADS: gl.constexpr, ROWS: gl.constexpr,
               GROUPS: gl.constexpr, NUM_STAGES: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr, PAGES: gl.constexpr,
               EARLY: gl.constexpr, MAPS: gl.constexpr, MERGE: gl.constexpr):  # fmt: skip
    """Grid: parts × groups programs, the groups of a part side by side so that they share its pages in L2. TILE: 16 or 32 if
    ROWS is no more, else 64. PAGES, EARLY, MAPS, MERGE: of `switches`."""
    qr = gl.allocate_shared_memory(gl.bfloat16, [64, 64], qr_desc.layout)
    k8 = gl.allocate_shared_memory(gl.float8e4nv, [NUM_STAGES * 4, 1, 64, 128], k8_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, 1, 64, 64], kr_desc.layout)
    ks = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, 64], ks_desc.layout)
    F16: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    v = half_page_buffers()
    p = gl.allocate_shared_memory(gl.float16, [2, 64, 64], F16)
    SPREAD: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    spread = gl.allocate_shared_memory(gl.float32, [64, 64] if TILE < 64 else [1, 4], SPREAD)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    alphas = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    inverse = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    mapped, q_full, q_empty, l_full, l_empty, k_full, k_empty = handshakes(NUM_STAGES, 3)
    p_full, p_empty = probability_handshakes(2)
    queries = Queries(qr, qr, q_full, q_empty)
    pages = Pages(k8, kr, ks, k_full, k_empty)
    probabilities = Probabilities(p, alphas, p_full, p_empty)
    sums = Sums(inverse, l_full, l_empty)
    results = Results(out, partial, lse)
    work = Work(records, starts, lengths, spans, counters, count, parts, page_table, table_width)
    if PDL:
        launch_dependents()
    gl.warp_specialize(
        [
            (_scores, (q8, q_scale, lse, queries, pages, spread, probabilities, sums, work, scale_log2, HEADS, ROWS, GROUPS,
                       NUM_STAGES, TILE, PAGES, EARLY)),
            (_values, (results, pages, v[0], v[1], v[2], v[3], probabilities, sums, work, 0, ROWS, GROUPS, NUM_STAGES, PAGES,
                       EARLY, MERGE)),
            (_values, (results, pages, v[4], v[5], v[6], v[7], probabilities, sums, work, 1, ROWS, GROUPS, NUM_STAGES, PAGES,
                       EARLY, MERGE)),
            (loader, (qr_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, work, ROWS, GROUPS, 64, False, PAGES,
                      EARLY, MAPS, NUM_STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
