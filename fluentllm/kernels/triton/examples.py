"""Calls of every launcher with the shapes of real models, on tensors without memory: what the compile check compiles.

A kernel that no example launches fails the check, so a new kernel cannot be forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..moe import LiveRows, Routing
from ..prefill_rows import PrefillRows
from .commit import commit_tokens, decode_rows, leave_drafts
from .draft_rows import next_rows, shift_rows
from .draw import argmax, draw
from .elementwise import embedding, rotary, silu_mul
from .filter import filter_thresholds
from .fixed_attention import fixed_attention, plan_decode, plan_prefill, span_of
from .fixed_ops import EXPERT_TILE
from .fixed_product import fixed_bmm, fixed_linear
from .fp8_gemm import fp8_gemm
from .fp8_quantise import quantise_rows, silu_mul_quantise
from .gqa_decode import gqa_decode, query_tiles
from .gqa_plan import plan_gqa
from .gqa_prefill import gqa_prefill
from .gqa_prefill_plan import PrefillPlan
from .kv_append import append, rotate_and_append
from .launch import recording
from .linear import linear, linear_norm, new_counters
from .linear_tiles import LinearTile, rule
from .mla_absorb import absorb
from .mla_rows import append_and_rotate, append_latents, rotate_queries
from .moe import experts, fp8_experts
from .moe_route import route
from .moe_scores import normed_router_logits, router_logits
from .moe_scores_wide import new_counters as score_counters, wide_router_logits
from .moe_sort import sort_by_expert
from .moe_stream import stream_down, stream_gate_up
from .moe_tiles import Tile, tile_for
from .ngram import ngram_embedding, ngram_gather
from .norm import add_rms_norm, draft_input, rms_norm
from .normed import NormAfter
from .prefill_rows import prefill_rows
from .prompt_lookup import prompt_lookup
from .publish import publish
from .qkv_product import QkvProduct, from_product_fits
from .streamed_weight import StreamedFp8Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from .launch import Launch

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int32)


def _longs(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


def _floats(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float32)


def decode_attention() -> None:
    # (sequences, heads, KV heads, dim, rows, page, dtype, dtype of the cache)
    shapes = [
        (1, 16, 8, 128, 1, 16, BF16, BF16),
        (32, 32, 8, 128, 1, 64, BF16, BF16),
        (32, 32, 8, 128, 4, 64, BF16, FP8),
        (128, 36, 4, 96, 8, 32, torch.float16, torch.float16),
        (4, 8, 1, 256, 2, 64, BF16, BF16),
        (2, 4, 4, 64, 1, 16, torch.float32, torch.float32),
    ]
    for n, heads, kv_heads, dim, rows, page, dtype, kv_dtype in shapes:
        lengths = _ints(n)
        cache = _empty(1000, page, kv_heads, dim, dtype=kv_dtype)
        for longest, span in ((4096, 0), (256, 0), (4096, 512)) if n == 1 else ((4096, 0),):
            plan = plan_gqa(lengths, kv_heads=kv_heads, longest=longest, fixed_span=span)
            q = _empty(n * rows, heads, dim, dtype=dtype)
            gqa_decode(q, cache, cache, _ints(n, longest // page), lengths, plan, rows, dim**-0.5)
        if from_product_fits(dim, dim) and dtype is BF16:
            plan = plan_gqa(lengths, kv_heads=kv_heads, longest=4096)
            rope, norm = _empty(n * rows, 1, dim), _empty(dim) if heads == 16 else None
            product = _empty(n * rows, (heads + 2 * kv_heads) * dim)
            whole = QkvProduct(product, rope, rope, _longs(n * rows), heads, norm, norm, eps=1e-6)
            gqa_decode(whole, cache, cache, _ints(n, 4096 // page), lengths, plan, rows, dim**-0.5)
        if rows == 4:
            _, tiles = query_tiles(rows, heads // kv_heads)
            plan = plan_gqa(lengths, kv_heads=kv_heads, longest=4096, tiles=tiles, inside=True)
            gqa_decode(_empty(n * rows, heads, dim), cache, cache, _ints(n, 4096 // page), lengths, plan, rows, dim**-0.5)


def prefill_attention() -> None:
    for heads, kv_heads, dim, page, dtype, kv_dtype, rows in (
        (16, 8, 128, 64, BF16, FP8, 128),
        (32, 4, 96, 32, torch.float16, torch.float16, 64),
        (8, 1, 256, 64, BF16, BF16, 128),
        (4, 4, 64, 16, torch.float32, torch.float32, 16),
    ):
        cache = _empty(1000, page, kv_heads, dim, dtype=kv_dtype)
        for splits in (1, 3):
            plan = PrefillPlan((300, 5), (300, 1000), torch.device("meta"), rows=rows, splits=splits)
            gqa_prefill(_empty(305, heads, dim, dtype=dtype), cache, cache, _ints(2, 64), plan, dim**-0.5)
    # MLA in expanded form.
    q, keys, values = _empty(305, 16, 192), _empty(21, 64, 16, 192), _empty(21, 64, 16, 128)
    for splits in (1, 3):
        plan = PrefillPlan((300, 5), (300, 1000), torch.device("meta"), splits=splits)
        gqa_prefill(q, keys, values, _ints(2, 16), plan, 192**-0.5)


def keys_and_values() -> None:
    for heads, kv_heads, dim, rotates, interleaved, norm, kv_dtype in (
        (32, 8, 128, 128, False, False, BF16),
        (16, 8, 128, 128, False, True, BF16),
        (16, 8, 128, 64, True, True, FP8),
        (9, 3, 64, 64, False, False, BF16),
        (32, 32, 96, 96, False, False, BF16),
    ):
        rows = _empty(16000, kv_heads, dim, dtype=kv_dtype)
        table, weight = _empty(4096, 1, rotates), _empty(dim) if norm else None
        qkv = _empty(8, (heads + 2 * kv_heads) * dim)
        rotate_and_append(
            qkv, table, table, _longs(8), rows, rows, heads, positions=_longs(8), q_weight=weight, k_weight=weight,
            eps=1e-6, interleaved=interleaved,
        )  # fmt: skip
    for heads, q_size in ((16, 1536), (32, 1536), (16, 0)):
        rope, kv, cache = _empty(8, 1, 64), _empty(8, q_size + 576)[:, q_size:], _empty(16000, 576)
        scale = 1.0 if heads == 16 else 2.4
        append_latents(kv, _empty(512), rope, rope, _longs(8), cache, eps=1e-6, latent_scale=scale, interleaved=heads == 32)
        q = _empty(8, heads, 192)
        rotate_queries(q[..., 128:], rope, rope, _empty(8, heads, 64), interleaved=heads == 32)
        append_and_rotate(
            q[..., 128:], kv, _empty(512), rope, rope, _longs(8), cache, eps=1e-6, latent_scale=scale, interleaved=heads == 32
        )
    latent = _empty(16000, 576)
    append(_empty(8, 512), _empty(8, 64), _longs(8), latent[:, :512], latent[:, 512:])
    append(_empty(8, 1024), _empty(8, 1024), _longs(8), *[_empty(16000, 1024, dtype=FP8)] * 2)


def absorbed_queries() -> None:
    # DeepSeek-V3-Lite's heads, LongCat's, LongCat-Flash-Lite's, and a rank's of two
    for heads in (16, 64, 32, 8):
        for tokens in (1, 8, 32, 64) if heads == 16 else (1, 64):
            rope, kv = _empty(tokens, 1, 64), _empty(tokens, 2112)[:, 1536:]
            absorb(
                _empty(tokens, heads, 192), _empty(heads, 128, 512), kv, _empty(512), rope, rope, _longs(tokens),
                _empty(16000, 576), eps=1e-6, latent_scale=1.0 if heads == 16 else 2.4, interleaved=heads == 64,
            )  # fmt: skip


def small_operations() -> None:
    for size in (576, 2048, 4096):
        x, weight = _empty(8, size), _empty(size)
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, x, weight, 1e-5)
        draft_input(_longs(8), _longs(8), _empty(32000, size), x, weight, weight, 1e-5)
    rms_norm(_empty(8, 16, 128), _empty(128), 1e-5)
    silu_mul(_empty(8, 2 * 14336))
    embedding(_longs(8), _empty(32000, 4096))
    rotary(_empty(8, 16, 64), _empty(8, 1, 64), _empty(8, 1, 64), interleaved=True)
    rotary(_empty(8, 40, 128), _empty(8, 1, 128), _empty(8, 1, 128))


def sampling() -> None:
    floats, ints = _floats(33, 6), _longs(33, 8)
    for vocab in (128256, 102400):
        logits = _floats(32, vocab)
        argmax(logits)
        draw(logits, _longs(32), _longs(32), floats[:, 0], ints[:, 6])
        thresholds = filter_thresholds(logits, _longs(32), floats[:, 0], ints[:, 4], floats[:, 1], floats[:, 2])
        draw(logits, _longs(32), _longs(32), floats[:, 0], ints[:, 6], thresholds)


def step() -> None:
    ints, finished, history = _longs(33, 8), _empty(33, dtype=torch.bool), _ints(33, 8193)
    slots = _longs(32)
    for rows in (1, 4):
        decode_rows(slots, rows, ints[:, 0], ints[:, 7], finished, history, _ints(33, 128), 64)
        tokens = _longs(32, rows)
        columns = ints[:, 0], ints[:, 2], ints[:, 7]
        for counts, equal in ((None, None), (_ints(33, 128256), None), (None, _empty(32, rows - 1, dtype=torch.bool))):
            commit_tokens(tokens, tokens[:, 1:], slots, *columns, finished, _ints(33, 8), history, counts, equal)
    leave_drafts(_longs(32, 3), _longs(32), slots, ints[:, 0], ints[:, 7], history, 128256)
    publish(_ints(8, 8000), _longs(1), _ints(320), slots, 32, 2, last=True)
    publish(_ints(8, 8000), _longs(1), _ints(5120), slots, 32, 322, last=False)
    for rows, width in ((1, 2048), (4, 3072)):
        passed, table, states = _longs(32 * rows), _ints(32, 128), _empty(32 * rows, width)
        shift_rows(passed, passed, _ints(32), table, slots, rows, ints[:, 0], history, 64, states, _empty(1000, width))
        next_rows(slots, rows, ints[:, 0], finished, _ints(33, 128), 64)
    prompt_lookup(history, slots, ints[:, 0], 4, 2, 4)
    prefill_rows(PrefillRows.create(33, 4096, torch.device("meta")), 1000, 1024, history, _ints(33, 128), 64)


def mixture_of_experts() -> None:
    routings = (
        Routing(64, 6, scores="sigmoid", renormalise=True, shared=2),
        Routing(128, 12, zero_experts=64, scale=6.0),
        Routing(256, 8, scores="sigmoid", groups=8, top_groups=4, group_score="top2", renormalise=True, scale=2.5),
        Routing(160, 6, groups=8, top_groups=3),
    )
    for routing in routings:
        logits, bias = _floats(8, routing.total), _floats(routing.total)
        for chosen, live in ((None, None), (None, LiveRows(_longs(8), 64)), (bias, LiveRows(_longs(8), 64))):
            route(logits, routing, chosen, live)
        route(logits, routing, bias, LiveRows(_longs(32), 64, picked=_longs(8)))
    for tokens in (1, 32):
        router_logits(_empty(tokens, 2048), _floats(64, 2048))
        router_logits(_empty(tokens, 3072), _floats(192, 3072))
    for tokens, hidden, total in ((512, 2048, 64), (2048, 2048, 64), (8192, 2048, 64), (300, 3072, 192), (8192, 6144, 768)):
        x = _empty(tokens, hidden)
        wide_router_logits(x, _floats(total, hidden), counters=score_counters(x.device))
    tile = Tile(16, 64, 128, 4, 4, swapped=True)
    tiles = sort_by_expert(_ints(8, 6), 64, tile.rows)
    stream_down(stream_gate_up(_empty(8, 2048), _empty(64, 2816, 2048), tiles, 6, tile), _empty(64, 2048, 1408), tiles, tile)
    # (tokens, routing, hidden, inner): a GEMV, thin tiles, wide tiles, the largest
    for (hidden, inner), routing, several in (((2048, 1408), routings[0], (1, 4096)), ((3072, 1024), routings[1], (32, 256))):
        for tokens in several:
            x, choices = _empty(tokens, hidden), (tokens, routing.each)
            gate_up = _empty(routing.experts + routing.shared, 2 * inner, hidden)
            down = _empty(routing.experts + routing.shared, hidden, inner)
            shared = x if routing.zero_experts == 0 else None
            experts(x, _floats(*choices), _ints(*choices), gate_up, down, shared)
            experts(x, _floats(*choices), _ints(*choices), gate_up, down, shared, after=NormAfter(_empty(hidden), 1e-6, x))


def products_of_few_rows() -> None:
    # A matrix with few rows, one with many, gate and up in one.
    for tokens, rows, depth, gated in ((1, 1024, 3072, False), (16, 28672, 4096, False), (64, 1024, 3072, False),
                                       (64, 6144, 1024, True)):  # fmt: skip
        x, weight = _empty(tokens, depth), _empty(rows, depth)
        other = None if gated else _empty(tokens, rows)
        linear(x, weight, gated=gated, other=other, counters=new_counters(rows, x.device))
        gate_up = _empty(tokens, 2 * depth)
        q, scale = quantise_rows(x)
        silu_mul_quantise(gate_up)
        scales = _floats(-(-rows // 128), -(-depth // 128))
        matrix = _empty(rows, depth, dtype=FP8)
        for tile in (None, rule(tokens, rows, depth, 1, gated)):  # Hopper's kernels, and the one for others
            linear(q, matrix, x_scale=scale, w_scale=scales, gated=gated, counters=new_counters(rows, x.device), tile=tile)

    # A norm between two products: of all columns behind the residual stream, of MLA's query latent; in front of a router.
    for tokens, rows, depth in ((1, 2048, 2048), (32, 3072, 4096)):
        x, stream, gain = _empty(tokens, depth), _empty(tokens, rows), _empty(rows)
        for other in (None, stream):
            normed, _ = linear_norm(
                x, _empty(rows, depth), NormAfter(gain, 1e-6, stream), other=other, counters=new_counters(rows, x.device)
            )
        linear(normed, _empty(12288, rows), gated=True)
        normed_router_logits(normed, _floats(64, rows))
        latent, _ = linear_norm(
            normed, _empty(2112, rows), NormAfter(_empty(1536), 1e-6), counters=new_counters(2112, x.device)
        )
        linear(latent, _empty(3072, 1536), counters=new_counters(3072, x.device))
    fp8 = StreamedFp8Weight(_empty(2048, 2048, dtype=FP8), _floats(16, 16))
    fp8.gated(fp8.stream_norm(_empty(8, 2048), NormAfter(_empty(2048), 1e-6, _empty(8, 2048)))[0])

    for tma in (False, True):
        tile = LinearTile(16, 32, 128, 2, 4, tma=tma, prefetch=4)
        linear(_empty(16, 4096), _empty(1024, 4096), tile=tile, counters=new_counters(1024, torch.device("meta")))
    fp8_gemm(_empty(4096, 6144, dtype=FP8), _floats(48, 4096), _empty(2112, 6144, dtype=FP8), _floats(17, 48))


def ngrams() -> None:
    tables, hidden = 12, 3072
    rows, words = ngram_gather(
        _longs(8), _longs(8), _longs(8), _ints(33, 8193), _longs(2), _longs(4, tables), _longs(tables), _longs(tables),
        _empty(1 << 20, hidden // tables), _empty(131072, hidden),
    )  # fmt: skip
    ngram_embedding(rows, words, _empty(hidden, hidden), tables)


def experts_in_fp8() -> None:
    for tokens, (hidden, inner), (count, top_k) in (
        (1, (2048, 1408), (64, 6)),
        (64, (3072, 1024), (128, 12)),
        (512, (2048, 1408), (64, 6)),
    ):
        gate_up = _empty(count, 2 * inner, hidden, dtype=FP8), _floats(count, inner // 64, hidden // 128)
        down = _empty(count, hidden, inner, dtype=FP8), _floats(count, hidden // 128, inner // 128)
        choices = tokens, top_k
        x, weights, ids = _empty(tokens, hidden), _floats(*choices), _ints(*choices)
        fp8_experts(x, weights, ids, gate_up, down)
        fp8_experts(x, weights, ids, gate_up, down, tile=tile_for(ids.numel(), count, width=1))


def fixed_order() -> None:
    # (heads, KV heads, dim, values, page, dtype): grouped heads, and latents.
    for heads, kv_heads, dim, value_dim, page, dtype in (
        (32, 8, 128, 128, 16, BF16),
        (16, 8, 96, 96, 16, torch.float16),
        (8, 1, 256, 256, 64, BF16),
        (16, 1, 576, 512, 64, BF16),
        (4, 4, 64, 64, 16, torch.float32),
        (16, 1, 576, 512, 64, torch.float32),
    ):
        span, group = span_of(131072), heads // kv_heads
        cache, table = _empty(1000, page, kv_heads, dim, dtype=dtype), _ints(2, 131072 // page)
        plans = [
            plan_prefill(_ints(3), _ints(2), (300, 5), group, value_dim, span),
            plan_decode(_ints(3), _ints(2), 4, group, value_dim, kv_heads, 131072, span),
        ]
        for plan, rows in zip(plans, (305, 8), strict=True):
            fixed_attention(_empty(rows, heads, dim, dtype=dtype), cache, cache[..., :value_dim], table, plan, 0.1)
    for rows, depth, dtype in ((4096, 4096, BF16), (151936, 1024, BF16), (2112, 2048, torch.float32)):
        for tokens in (1, 300):
            x, weight = _empty(tokens, depth, dtype=dtype), _empty(rows, depth, dtype=dtype)
            fixed_linear(x, weight, out_dtype=torch.float32)
            fixed_linear(x, weight, gated=True)
    q, scale = quantise_rows(_empty(300, 2048))
    for gated in (False, True):
        fixed_linear(q, _empty(4096, 2048, dtype=FP8), x_scale=scale, w_scale=_floats(32, 16), gated=gated)
    fixed_bmm(_empty(5, 16, 128).transpose(0, 1), _empty(16, 128, 512))
    fixed_bmm(_empty(5, 16, 128, dtype=torch.float32).transpose(0, 1), _floats(16, 128, 512))
    router_logits(_empty(2, 2048), _floats(64, 2048), each=4)
    choices = 2, 6
    experts(
        _empty(2, 2048), _floats(*choices), _ints(*choices), _empty(64, 2816, 2048), _empty(64, 2048, 1408), tile=EXPERT_TILE
    )


EXAMPLES: list[Callable[[], None]] = [
    decode_attention,
    prefill_attention,
    keys_and_values,
    absorbed_queries,
    small_operations,
    sampling,
    step,
    mixture_of_experts,
    products_of_few_rows,
    experts_in_fp8,
    ngrams,
    fixed_order,
]


def example_launches() -> Iterator[tuple[str, Launch]]:
    """(name of the example, launch), every launch of every example."""
    for example in EXAMPLES:
        with recording() as launches:
            example()
        yield from ((example.__name__, launch) for launch in launches)
