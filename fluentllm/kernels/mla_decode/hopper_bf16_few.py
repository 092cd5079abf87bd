"""MLA decode over the BF16 cache on Hopper for up to 32 rows, operands swapped (`hopper_swapped`).

K and V are the page as it lies, so nothing is converted, and a page is held until its values are summed. The queries take so
little that the ring has half a page more than in `hopper_bf16`, whose loader this is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..triton.hopper_language import launch_dependents
from .hopper_bf16 import bounded_logits, loader, place_of
from .hopper_common import Pages, Probabilities, Queries, Results, Sums, Work, handshakes, probability_handshakes, softmax_page
from .hopper_swapped import by_rows, factors, new_spread, scores, values

HALVES = 5
"""Of pages in the ring."""
TILES = (16, 32)
"""Rows of the MMA. 8 would save little: 16 of a product's 20 cycles read keys out of shared memory."""


@gluon.jit
def _score_page(queries, pages, step, spread, factor, hidden_from, visible, key, top, total, probabilities,
                HALVES: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    raw = gl.zeros([64, TILE], gl.float32, S)
    for half in gl.static_range(2):
        place, parity = place_of(step, half, HALVES)
        mbarrier.wait(pages.full.index(place), parity)
        keys = pages.content.index(place).reshape([64, 256])
        columns = queries.content.slice(256 * half, 256, dim=1).permute((1, 0))
        raw = warpgroup_mma(keys, columns, raw, use_acc=half > 0, is_async=True)
    keys = pages.rope.index(step % (HALVES // 2)).reshape([64, 64])
    raw = warpgroup_mma(keys, queries.rope.permute((1, 0)), raw, is_async=True)
    raw = warpgroup_mma_wait(0, deps=[raw])
    for half in gl.static_range(2):
        mbarrier.arrive(pages.empty.index(place_of(step, half, HALVES)[0]), count=1)
    logits = bounded_logits(by_rows(raw, spread, key), factor, hidden_from, visible, key)
    return softmax_page(logits, None, top, total, probabilities, step, TILE, 1)


@gluon.jit
def _add_page(left, right, pages, wide, probabilities, step, HALF: gl.constexpr, HALVES: gl.constexpr):
    place, parity = place_of(step, HALF, HALVES)
    mbarrier.wait(pages.full.index(place), parity)
    mbarrier.wait(probabilities.full.index(0), step & 1)
    alpha = factors(probabilities, 0, left)
    prob = probabilities.p.index(0).permute((1, 0))
    value = pages.content.index(place).reshape([64, 256])
    left = left * alpha
    right = right * alpha
    left = warpgroup_mma(value.slice(0, 128, dim=1).permute((1, 0)), prob, left, is_async=True)
    right = warpgroup_mma(value.slice(128, 128, dim=1).permute((1, 0)), prob, right, is_async=True)
    left, right = warpgroup_mma_wait(0, deps=[left, right])
    mbarrier.arrive(pages.empty.index(place), count=1)
    mbarrier.arrive(probabilities.empty.index(0), count=1)
    return left, right


@gluon.jit(do_not_specialize=["count", "parts"])
def decode_bf16_few(q_desc, qr_desc, kv_desc, kr_desc, out, partial, lse, page_table, lengths, starts, spans, records, counters,
                    count, parts, scale_log2, table_width, HEADS: gl.constexpr, ROWS: gl.constexpr, HALVES: gl.constexpr,
                    TILE: gl.constexpr, PDL: gl.constexpr, PAGES: gl.constexpr, EARLY: gl.constexpr, MAPS: gl.constexpr,
                    MERGE: gl.constexpr):  # fmt: skip
    """Grid: parts programs. TILE: of `TILES`, not less than ROWS. PAGES, EARLY, MAPS, MERGE: of `switches`."""
    q = gl.allocate_shared_memory(gl.bfloat16, [TILE, 512], q_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [TILE, 64], qr_desc.layout)
    kv = gl.allocate_shared_memory(gl.bfloat16, [HALVES, 1, 64, 256], kv_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [HALVES // 2, 1, 64, 64], kr_desc.layout)
    # One buffer: a page's values are summed before the next one's probabilities are there.
    p = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    spread = new_spread(TILE)
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
    SCORE: gl.constexpr = _score_page
    ADD: gl.constexpr = _add_page
    if PDL:
        launch_dependents()
    gl.warp_specialize(
        [
            (scores, (SCORE, None, lse, queries, pages, spread, probabilities, sums, work, scale_log2, HEADS, ROWS, HALVES,
                      TILE, PAGES, EARLY)),
            (values, (ADD, results, pages, None, probabilities, sums, work, 0, ROWS, HALVES, TILE, PAGES, EARLY, MERGE)),
            (values, (ADD, results, pages, None, probabilities, sums, work, 1, ROWS, HALVES, TILE, PAGES, EARLY, MERGE)),
            (loader, (q_desc, qr_desc, kv_desc, kr_desc, queries, pages, mapped, work, ROWS, 1, TILE, PAGES, EARLY, MAPS,
                      HALVES)),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip
