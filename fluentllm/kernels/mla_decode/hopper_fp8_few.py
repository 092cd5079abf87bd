"""MLA decode over the FP8 cache on Hopper for up to 16 rows, operands swapped (`hopper_swapped`).

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

from ..triton.hopper_language import launch_dependents
from .hopper_common import (
    Pages,
    Probabilities,
    Queries,
    Results,
    Sums,
    Work,
    half_page_buffers,
    handshakes,
    probability_handshakes,
    softmax_page,
)
from .hopper_fp8 import convert, loader, weighted_logits
from .hopper_swapped import by_rows, factors, new_spread, scores, values


@gluon.jit
def _score_page(queries, pages, step, spread, factor, hidden_from, visible, key, top, total, probabilities,
                STAGES: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Two accumulators: FP8 and BF16 products have different types of layout."""
    S8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    SR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    stage = step % STAGES
    mbarrier.wait(pages.full.index(stage), (step // STAGES) & 1)
    s8 = gl.zeros([64, TILE], gl.float32, S8)
    for panel in gl.static_range(4):
        keys = pages.content.index(stage * 4 + panel).reshape([64, 128])
        s8 = warpgroup_mma(keys, queries.content.index(panel).permute((1, 0)), s8, use_acc=panel > 0, is_async=True)
    keys = pages.rope.index(stage).reshape([64, 64])
    sr = gl.zeros([64, TILE], gl.float32, SR)
    sr = warpgroup_mma(keys, queries.rope.permute((1, 0)), sr, use_acc=False, is_async=True)
    s8, sr = warpgroup_mma_wait(0, deps=[s8, sr])
    raw = s8 + gl.convert_layout(sr, S8)
    bits = pages.scale.index(stage).reshape([64]).load(key.type.layout).to(gl.int32, bitcast=True)
    mbarrier.arrive(pages.empty.index(stage), count=1)
    weighted, reciprocal = weighted_logits(by_rows(raw, spread, key), bits, factor, hidden_from, visible, key)
    return softmax_page(weighted, reciprocal, top, total, probabilities, step, TILE, 2)


@gluon.jit
def _add_page(left, right, pages, wide, probabilities, step, HALF: gl.constexpr, STAGES: gl.constexpr):
    stage = step % STAGES
    buffer = step % 2
    mbarrier.wait(pages.full.index(stage), (step // STAGES) & 1)
    convert(pages, wide[0], wide[1], stage, HALF, 0)
    convert(pages, wide[2], wide[3], stage, HALF, 1)
    fence_async_shared()
    mbarrier.arrive(pages.empty.index(stage), count=1)
    mbarrier.wait(probabilities.full.index(buffer), (step // 2) & 1)
    alpha = factors(probabilities, buffer, left)
    left = left * alpha
    right = right * alpha
    for half in gl.static_range(2):
        prob = probabilities.p.index(buffer).slice(32 * half, 32, dim=1).permute((1, 0))
        left = warpgroup_mma(wide[2 * half].permute((1, 0)), prob, left, is_async=True)
        right = warpgroup_mma(wide[2 * half + 1].permute((1, 0)), prob, right, is_async=True)
    left, right = warpgroup_mma_wait(0, deps=[left, right])
    mbarrier.arrive(probabilities.empty.index(buffer), count=1)
    return left, right


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
    spread = new_spread(TILE)
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
    SCORE: gl.constexpr = _score_page
    ADD: gl.constexpr = _add_page
    if PDL:
        launch_dependents()
    gl.warp_specialize(
        [
            (scores, (SCORE, q_scale, lse, queries, pages, spread, probabilities, sums, work, scale_log2, HEADS, ROWS,
                      NUM_STAGES, TILE, PAGES, EARLY)),
            (values, (ADD, results, pages, (v[0], v[1], v[2], v[3]), probabilities, sums, work, 0, ROWS, NUM_STAGES, TILE,
                      PAGES, EARLY, MERGE)),
            (values, (ADD, results, pages, (v[4], v[5], v[6], v[7]), probabilities, sums, work, 1, ROWS, NUM_STAGES, TILE,
                      PAGES, EARLY, MERGE)),
            (loader, (q8_desc, qr_desc, k8_desc, kr_desc, ks_desc, queries, pages, mapped, work, ROWS, 1, TILE, True, PAGES,
                      EARLY, MAPS, NUM_STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
