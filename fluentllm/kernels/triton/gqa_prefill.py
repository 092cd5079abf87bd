"""Attention of prefill with grouped heads: ragged chunks, causal, over the pages of cached prefixes and of the chunks' own KV.

FlashAttention-2's loop (arXiv:2307.08691): one program for a tile of query rows of one head, or of all heads that share keys
(`gqa_prefill_plan`). Where several programs share the keys of a tile, they leave what they found to a merging kernel, as in
decode.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import dot, merge_runs
from .launch import launch, power_of_2, split_width

if TYPE_CHECKING:
    from torch import Tensor

    from .gqa_prefill_plan import PaddedPlan, PrefillPlan

SHARED_BYTES = 160 * 1024


@triton.jit
def _attend(acc, total, highest, queries, more_queries, position, page, k_pages, v_pages, base, last, kv_head, score_scale,
            k_page, k_slot, k_head, v_page, v_slot, v_head, d, dv, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
            PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
            MASKED: tl.constexpr, FIRST_KEY: tl.constexpr):  # fmt: skip
    """One block of keys, whose page numbers [BLOCK_N] are `page`. Not MASKED: every row sees all of them."""
    key = base + tl.arange(0, BLOCK_N)
    inside = key < last
    slot = key % PAGE
    k_at = k_pages + (page * k_page + slot * k_slot + kv_head * k_head)[:, None] + d[None, :]
    v_at = v_pages + (page * v_page + slot * v_slot + kv_head * v_head)[:, None] + dv[None, :]
    k_mask = (d < DIM)[None, :]
    v_mask = (dv < VALUE_DIM)[None, :]
    if MASKED:
        k_mask = k_mask & inside[:, None]
        v_mask = v_mask & inside[:, None]
    keys = tl.load(k_at, mask=k_mask, other=0.0).to(queries.dtype)
    scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if BLOCK_E > 0:
        e = tl.arange(0, BLOCK_E)
        k_at = k_pages + BLOCK_D + (page * k_page + slot * k_slot + kv_head * k_head)[:, None] + e[None, :]
        e_mask = (BLOCK_D + e < DIM)[None, :]
        if MASKED:
            e_mask = e_mask & inside[:, None]
        scores = dot(more_queries, tl.trans(tl.load(k_at, mask=e_mask, other=0.0).to(queries.dtype)), scores)
    scores = scores * score_scale
    if MASKED:
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    if FIRST_KEY > 0:
        scores = tl.where(key[None, :] >= FIRST_KEY, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(highest - higher)
    values = tl.load(v_at, mask=v_mask, other=0.0).to(queries.dtype)
    total = total * fade + tl.sum(weights, 1)
    acc = dot(weights.to(queries.dtype), values, acc * fade[:, None])
    return acc, total, higher


@triton.jit(do_not_specialize=["tile_count", "splits", "total_rows"])
def _prefill_kernel(
    out, lse, q, k_pages, v_pages, page_table, tiles, tile_count, splits, total_rows, score_scale, value_scale,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr = 1, FIRST_KEY: tl.constexpr = 0, SPLIT: tl.constexpr = False,
):  # fmt: skip
    """out [T, H, Dv]; or, if SPLIT, [splits, T, H, Dv] float32 and lse [splits, T, H] float32 in log2 units: programs of a
    tile have a run of its keys each."""
    tile = tl.program_id(1)
    sequence = tl.load(tiles + tile)
    start = tl.load(tiles + tile_count + tile)
    count = tl.load(tiles + 2 * tile_count + tile)
    first_position = tl.load(tiles + 3 * tile_count + tile)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    head = tl.program_id(0) * PACK + m % PACK
    row = (start + m // PACK).to(tl.int64)
    valid = m < count * PACK
    position = first_position + m // PACK
    q_at = q + (row * q_row + head * q_head)[:, None]
    queries = tl.load(q_at + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    more_queries = queries
    if BLOCK_E > 0:
        e = tl.arange(0, BLOCK_E)
        more_queries = tl.load(q_at + BLOCK_D + e[None, :], mask=valid[:, None] & (BLOCK_D + e < DIM)[None, :], other=0.0)
    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    table = page_table + sequence.to(tl.int64) * table_row
    last = first_position + count
    run = tl.cdiv(tl.cdiv(last, splits), BLOCK_N) * BLOCK_N
    begin = tl.program_id(2) * run
    end = tl.minimum(begin + run, last)
    seen_by_all = tl.minimum((first_position + 1) // BLOCK_N * BLOCK_N, end)
    kv_head = tl.program_id(0) * PACK // GROUP
    # Page numbers are fetched one block ahead, so that loads of keys wait for no other load.
    n = tl.arange(0, BLOCK_N)
    next_page = tl.load(table + (begin + n) // PAGE, mask=begin + n < last, other=0)
    for base in range(begin, seen_by_all, BLOCK_N):
        page = next_page.to(tl.int64)
        ahead = base + BLOCK_N + n
        next_page = tl.load(table + ahead // PAGE, mask=ahead < last, other=0)
        acc, total, highest = _attend(
            acc, total, highest, queries, more_queries, position, page, k_pages, v_pages, base, last, kv_head, score_scale,
            k_page, k_slot, k_head, v_page, v_slot, v_head, d, dv, DIM, VALUE_DIM, PAGE, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_E, False, FIRST_KEY,
        )  # fmt: skip
    for base in range(tl.maximum(begin, seen_by_all), end, BLOCK_N):
        page = next_page.to(tl.int64)
        ahead = base + BLOCK_N + n
        next_page = tl.load(table + ahead // PAGE, mask=ahead < last, other=0)
        acc, total, highest = _attend(
            acc, total, highest, queries, more_queries, position, page, k_pages, v_pages, base, last, kv_head, score_scale,
            k_page, k_slot, k_head, v_page, v_slot, v_head, d, dv, DIM, VALUE_DIM, PAGE, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_E, True, FIRST_KEY,
        )  # fmt: skip
    result = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
    if SPLIT:
        row += tl.program_id(2).to(tl.int64) * total_rows
        seen = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse + row * HEADS + head, seen, mask=valid)
    at = out + ((row * HEADS + head) * VALUE_DIM)[:, None] + dv[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=valid[:, None] & (dv < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["splits", "cells"])
def _merge_runs_kernel(out, partial, lse, splits, cells, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, RUNS: tl.constexpr):
    """out [cells, Dv] of partial [splits, cells, Dv] and lse [splits, cells], float32; a cell is a row's head."""
    cell = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_V)
    index = tl.arange(0, RUNS)
    top = -1.0e30
    total = 0.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    for base in range(0, splits, RUNS):
        at = (base + index).to(tl.int64) * cells + cell
        inside = base + index < splits
        seen = tl.load(lse + at, mask=inside, other=float("-inf"))
        values = tl.load(
            partial + (at * VALUE_DIM)[:, None] + dv[None, :], mask=inside[:, None] & (dv < VALUE_DIM)[None, :], other=0.0
        )
        acc, total, top = merge_runs(acc, total, top, seen, values)
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + cell * VALUE_DIM + dv, result.to(out.dtype.element_ty), mask=dv < VALUE_DIM)


def gqa_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    plan: PrefillPlan | PaddedPlan,
    scale: float,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    first_key: int = 0,
) -> Tensor:
    """q [T, H, D] (last dimension contiguous), k_pages [P, page, Hkv, D], v_pages [P, page, Hkv, Dv], page_table [N, W] int32 →
    [T, H, Dv] in q's dtype; the chunk's own KV is in the pages already. Scales and `first_key` as in
    `gqa_decode`.

    Reference: `kernels.attention_reference.gqa_reference`.
    """
    (tokens, heads, dim), (_, page, kv_heads, value_dim) = q.shape, v_pages.shape
    out = q.new_empty(tokens, heads, value_dim)
    (block_d, block_e), block_v = split_width(dim), max(16, power_of_2(value_dim))
    block_m, block_n = plan.rows, 64
    stage = (block_d + block_e + block_v) * k_pages.element_size()
    queries = block_m * (block_d + block_e) * q.element_size()
    while block_n > 16 and queries + block_n * stage > SHARED_BYTES:
        block_n //= 2
    tiles = plan.tiles(heads, kv_heads)
    count, splits = tiles.table.shape[1], tiles.splits
    into, lse = out, None
    if splits > 1:
        into = torch.empty(splits, tokens, heads, value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device)
    launch(
        _prefill_kernel, (heads // tiles.pack, count, splits), into, lse, q, k_pages, v_pages, page_table, tiles.table,
        count, splits, tokens, scale * k_scale * math.log2(math.e), v_scale,
        q.stride(0), q.stride(1), *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0),
        GROUP=heads // kv_heads, HEADS=heads, DIM=dim, VALUE_DIM=value_dim, PAGE=page, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=block_d, BLOCK_E=block_e, BLOCK_V=block_v, PACK=tiles.pack, FIRST_KEY=first_key, SPLIT=splits > 1,
        num_warps=8 if block_m >= 128 else 4, num_stages=1 + max(1, min(2, (SHARED_BYTES - queries) // (block_n * stage))),
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge_runs_kernel, (tokens * heads,), out, into, lse, splits, tokens * heads,
            VALUE_DIM=value_dim, BLOCK_V=block_v, RUNS=8, num_warps=4,
        )  # fmt: skip
    return out
