"""MLA decode over the FP8 cache on Hopper for more than 16 rows, where the MMAs set the pace: V goes from pages to registers.

The output is O^T = V^T P^T: columns of V on the MMA's M, rows on its N. The MMA's first operand may come from registers. There
V^T is made from the page as it lies, with no copy in FP16: a thread reads four neighbouring columns of a key at a time, and
which columns an MMA's row stands for is ours to choose, so that what a thread has read is what it must hold. Bytes change
places inside of a thread only, and are converted (exactly).

The scores keep S = Q K^T, rows on the MMA's M, a row's keys in one quad; P is stored as [rows, keys], which is P^T as an MMA's
second operand takes it. Queries come by TMA. Partitions and order are those of `hopper_fp8`.
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
    exp2,
    handshakes,
    next_piece,
    part_of,
    probability_handshakes,
    publish_sums,
    row_max,
    store_columns,
)
from .hopper_fp8 import loader, weighted_logits
from .hopper_merge import clear_inert, count_piece, ends_of_part, merge_splits

STAGES = 4
LAG: gl.constexpr = gl.constexpr(8.0)
"""By how much, in log2 units, a logit may exceed the reference of the softmax before that follows: FP16 holds 2^15."""


@gluon.jit
def _raw_scores(queries, pages, stage, zeror, S8: gl.constexpr, SR: gl.constexpr, LATENT_FIRST: gl.constexpr):
    """Q K^T of one page, unscaled. FP8 and BF16 products have different types of layout, though the same registers: what one
    part gives, once it is there, is where the other's products begin. LATENT_FIRST: of `switches`."""
    if LATENT_FIRST:
        raw = gl.convert_layout(zeror, S8, assert_trivial=True)
        for panel in gl.static_range(4):
            keys = pages.content.index(stage * 4 + panel).reshape([64, 128]).permute((1, 0))
            raw = warpgroup_mma(queries.content.index(panel), keys, raw, use_acc=panel > 0, is_async=True)
        sr = gl.convert_layout(warpgroup_mma_wait(0, deps=[raw]), SR, assert_trivial=True)
        sr = warpgroup_mma(queries.rope, pages.rope.index(stage).reshape([64, 64]).permute((1, 0)), sr, is_async=True)
        return gl.convert_layout(warpgroup_mma_wait(0, deps=[sr]), S8, assert_trivial=True)
    sr = warpgroup_mma(
        queries.rope, pages.rope.index(stage).reshape([64, 64]).permute((1, 0)), zeror, use_acc=False, is_async=True
    )
    raw = gl.convert_layout(warpgroup_mma_wait(0, deps=[sr]), S8, assert_trivial=True)
    for panel in gl.static_range(4):
        keys = pages.content.index(stage * 4 + panel).reshape([64, 128]).permute((1, 0))
        raw = warpgroup_mma(queries.content.index(panel), keys, raw, is_async=True)
    return warpgroup_mma_wait(0, deps=[raw])


@gluon.jit
def _softmax_page(raw, scale_bits, factor, hidden_from, visible, key, top, total, probabilities, step, SUMS: gl.constexpr):
    """As `hopper_common.softmax_page`, with sums [64, 4]: those of a quad's lanes stay apart until the piece ends."""
    weighted, reciprocal = weighted_logits(raw, scale_bits, factor, hidden_from, visible, key)
    best = row_max(weighted)
    # A reference that lags serves as well, and the output need not be scaled for every small step: P stays below 2^LAG.
    new_top = gl.where(best > top + LAG, best, top)
    alpha = exp2(top - new_top)
    prob = exp2(weighted - new_top[:, None])
    buffer = step % 2
    mbarrier.wait(probabilities.empty.index(buffer), ((step // 2) & 1) ^ 1)
    probabilities.p.index(buffer).store(prob.to(gl.float16))
    probabilities.alphas.index(buffer).store(alpha)
    fence_async_shared()
    mbarrier.arrive(probabilities.full.index(buffer), count=1)
    own = gl.sum(gl.sum((prob * reciprocal[None, :]).reshape([64, 8, 4, 2]), 1), 2)
    kept = gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))
    total = total * kept[:, None] + gl.convert_layout(own, SUMS, assert_trivial=True)
    return new_top, total


@gluon.jit
def _scores(q_scale, lse, queries, pages, probabilities, sums, work, scale_log2, HEADS: gl.constexpr, ROWS: gl.constexpr,
            GROUPS: gl.constexpr, NUM_STAGES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr,
            LATENT_FIRST: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, GROUPS)
    group = gl.program_id(0) % GROUPS
    S8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    SR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # The sums of a row's keys stay apart in the four lanes that hold them, until a piece ends.
    SUMS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, S8))
    key = gl.arange(0, 64, gl.SliceLayout(0, S8))
    zeror = gl.zeros([64, 64], gl.float32, SR)
    step = 0
    piece = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            factor = gl.load(q_scale + sequence * ROWS + row, mask=row < ROWS, other=0.0) * scale_log2
            least = keys - ROWS // HEADS + 1
            visible = least + row // HEADS
            top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, S8))
            total = gl.zeros([64, 4], gl.float32, SUMS)
            mbarrier.wait(queries.full, piece & 1)
            for index in range(first, last):
                stage = step % NUM_STAGES
                mbarrier.wait(pages.full.index(stage), (step // NUM_STAGES) & 1)
                raw = _raw_scores(queries, pages, stage, zeror, S8, SR, LATENT_FIRST)
                bits = pages.scale.index(stage).reshape([64]).load(gl.SliceLayout(0, S8)).to(gl.int32, bitcast=True)
                mbarrier.arrive(pages.empty.index(stage), count=1)
                top, total = _softmax_page(raw, bits, factor, least - index * 64, visible - index * 64, key, top, total,
                                           probabilities, step, SUMS)  # fmt: skip
                step += 1
            mbarrier.arrive(queries.empty, count=1)
            total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
            here = Piece(part, sequence, first, last, keys, piece)
            publish_sums(sums, lse, top, total, here, row, ROWS, 64)
            piece += 1
        first = next_first
        last = next_last
        keys = next_keys


@gluon.jit
def _columns_of_keys(pages, panel, FROM: gl.constexpr, A: gl.constexpr):
    """V^T of 16 keys, from FROM on, and the 128 columns of a panel: [128, 16] FP16, as an MMA's first operand."""
    # Lane (g, t) of a warp holds keys 2t, 2t + 1, 2t + 8, 2t + 9 of columns 4g … 4g + 3: eight lanes read 32 contiguous bytes
    # of each of four keys, which do not meet in a bank of the 128-byte swizzle.
    READ: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]],
        warp_bases=[[0, 32], [0, 64]],
        block_bases=[],
        shape=[16, 128],
    )
    read = pages.content.index(panel).reshape([64, 128]).slice(FROM, 16, dim=0).load(READ)
    # [pairs of keys, the two, 32 runs of columns, 4 columns] → of each pair's four columns a register of FP16 each, the two
    # keys in it: the inputs' order in a thread is (key, column), the outputs' (column, key).
    pairs = read.reshape([8, 2, 32, 4]).permute((0, 2, 1, 3))
    pairs = gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high; .reg .b16 a, b, c, d;
        prmt.b32 low, $4, $5, 0x5140;
        prmt.b32 high, $4, $5, 0x7362;
        mov.b32 {a, b}, low;
        mov.b32 {c, d}, high;
        cvt.rn.f16x2.e4m3x2 $0, a;
        cvt.rn.f16x2.e4m3x2 $1, b;
        cvt.rn.f16x2.e4m3x2 $2, c;
        cvt.rn.f16x2.e4m3x2 $3, d;
        }""",
        "=r,=r,=r,=r,r,r", [pairs], dtype=gl.float16, is_pure=True, pack=8,
    )  # fmt: skip
    # [pairs of keys, warp, g, tile, half, the two] → rows of the MMA in the order (tile, warp, half, g), then keys.
    turned = pairs.reshape([8, 4, 8, 2, 2, 2]).permute((3, 1, 4, 2, 0, 5)).reshape([128, 16])
    return gl.convert_layout(turned, A, assert_trivial=True)


@gluon.jit
def _in_order(rows):
    """Columns of the output out of the order that `_columns_of_keys` gives the MMA's rows; a thread's four side by side."""
    STORED: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [0, 1], [0, 8], [0, 16], [0, 32]],
        lane_bases=[[0, 2], [0, 4], [4, 0], [8, 0], [16, 0]],
        warp_bases=[[32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 64],
    )
    turned = rows.reshape([2, 4, 2, 8, 64]).permute((1, 3, 0, 2, 4)).reshape([128, 64])
    return gl.convert_layout(turned, STORED, assert_trivial=True)


@gluon.jit
def _write_columns(results, left, right, sums, piece, group, HALF: gl.constexpr, ROWS: gl.constexpr):
    """As `hopper_common.write_piece`, of [columns, rows]."""
    mbarrier.wait(sums.full, piece.number & 1)
    factor = sums.inverse.load(gl.SliceLayout(0, left.type.layout))[None, :]
    mbarrier.arrive(sums.empty, count=1)
    left = _in_order(left * factor)
    right = _in_order(right * factor)
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(0, left.type.layout))
    column = HALF * 256 + gl.arange(0, 128, gl.SliceLayout(1, left.type.layout))
    store_columns(results, left, right, piece, row, column, ROWS)


@gluon.jit
def _values(results, pages, probabilities, sums, work, HALF: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
            NUM_STAGES: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MERGE: gl.constexpr):  # fmt: skip
    wait_for_inputs(EARLY)
    part, begin, end, high, first, last, keys = part_of(work, GROUPS)
    if MERGE:
        ends = ends_of_part(work, begin, end)
        clear_inert(results.out, work, GROUPS, ROWS, HALF)
    group = gl.program_id(0) % GROUPS
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    step = 0
    piece = 0
    before_a = 0
    before_b = 0
    for sequence in range(begin, end):
        next_first, next_last, next_keys = next_piece(work, sequence, end, high, PAGES > 0)
        if first < last:
            left = gl.zeros([128, 64], gl.float32, OUT)
            right = gl.zeros([128, 64], gl.float32, OUT)
            for _ in range(first, last):
                stage = step % NUM_STAGES
                buffer = step % 2
                panel = stage * 4 + HALF * 2
                mbarrier.wait(pages.full.index(stage), (step // NUM_STAGES) & 1)
                v_left = _columns_of_keys(pages, panel, 0, A)
                v_right = _columns_of_keys(pages, panel + 1, 0, A)
                mbarrier.wait(probabilities.full.index(buffer), (step // 2) & 1)
                alpha = probabilities.alphas.index(buffer).load(gl.SliceLayout(0, OUT))
                if gl.min(alpha, 0) < 1.0:
                    left = left * alpha[None, :]
                    right = right * alpha[None, :]
                # The two in turns: one's columns are converted while the other's product runs.
                for block in gl.static_range(4):
                    prob = probabilities.p.index(buffer).slice(block * 16, 16, dim=1).permute((1, 0))
                    left = warpgroup_mma(v_left, prob, left, is_async=True)
                    if block > 0:
                        right, v_right = warpgroup_mma_wait(1, deps=[right, v_right])
                        v_right = _columns_of_keys(pages, panel + 1, block * 16, A)
                    right = warpgroup_mma(v_right, prob, right, is_async=True)
                    if block < 3:
                        left, v_left = warpgroup_mma_wait(1, deps=[left, v_left])
                        v_left = _columns_of_keys(pages, panel, (block + 1) * 16, A)
                mbarrier.arrive(pages.empty.index(stage), count=1)
                left, right, v_left, v_right = warpgroup_mma_wait(0, deps=[left, right, v_left, v_right])
                mbarrier.arrive(probabilities.empty.index(buffer), count=1)
                step += 1
            here = Piece(part, sequence, first, last, keys, piece)
            _write_columns(results, left, right, sums, here, group, HALF, ROWS)
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
def decode_fp8_many(q8_desc, qr_desc, k8_desc, kr_desc, ks_desc, q_scale, out, partial, lse, page_table, lengths, starts, spans,
                    records, counters, count, parts, scale_log2, table_width, HEADS: gl.constexpr, ROWS: gl.constexpr,
                    GROUPS: gl.constexpr, NUM_STAGES: gl.constexpr, PDL: gl.constexpr, PAGES: gl.constexpr,
                    EARLY: gl.constexpr, MAPS: gl.constexpr, MERGE: gl.constexpr, LATENT_FIRST: gl.constexpr):  # fmt: skip
    """Grid: parts × groups programs, the groups of a part side by side so that they share its pages in L2. PAGES, EARLY, MAPS,
    MERGE, LATENT_FIRST: of `switches`."""
    q8 = gl.allocate_shared_memory(gl.float8e4nv, [4, 64, 128], q8_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [64, 64], qr_desc.layout)
    k8 = gl.allocate_shared_memory(gl.float8e4nv, [NUM_STAGES * 4, 1, 64, 128], k8_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, 1, 64, 64], kr_desc.layout)
    ks = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, 64], ks_desc.layout)
    F16: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    p = gl.allocate_shared_memory(gl.float16, [2, 64, 64], F16)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    alphas = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    inverse = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    mapped, q_full, q_empty, l_full, l_empty, k_full, k_empty = handshakes(NUM_STAGES, 3)
    p_full, p_empty = probability_handshakes(2)
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
            (_scores, (q_scale, lse, queries, pages, probabilities, sums, work, scale_log2, HEADS, ROWS, GROUPS, NUM_STAGES,
                       PAGES, EARLY, LATENT_FIRST)),
            (_values, (results, pages, probabilities, sums, work, 0, ROWS, GROUPS, NUM_STAGES, PAGES, EARLY, MERGE)),
            (_values, (results, pages, probabilities, sums, work, 1, ROWS, GROUPS, NUM_STAGES, PAGES, EARLY, MERGE)),
            (loader, (q8_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, work, ROWS, GROUPS, 64, True, PAGES,
                      EARLY, MAPS, NUM_STAGES)),
        ],
        [4, 4, 1],
        [176, 176, 24],
    )  # fmt: skip
