"""Attention in a fixed order over paged KV (deterministic mode): one kernel for prefill, decode and verification.

Keys are cut into runs of `span` positions, counted from position 0. A run is attended to from scratch, in blocks of keys, and
the runs' results are merged from left to right; so the additions behind a row are the same whatever pass it is part of. Where
there are few rows a run is one program's, and a second kernel merges; else a program merges its runs itself, by the same
formula. Blocks and runs that a row does not see add exact zeros to it. Products and sums are not contracted to FMA, which a
compiler might do in one of the two places only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import dot
from .launch import launch, multiprocessors, power_of_2, split_width
from .tile_table import tile_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LEAST_SPAN = 512
"""Keys of a run."""
MOST_RUNS = 64
"""Of the longest sequence."""
SHARED_BYTES = 100 * 1024
"""Of shared memory for keys and values in flight."""
_NO_FMA = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class FixedPlan:
    """Which rows each program computes; made once a pass, for all layers."""

    table: Tensor
    """[2, tiles] int32: sequence, and the tile's first pair (query row · group + head of the group) in it."""
    query_start: Tensor
    """[N + 1] int32."""
    lengths: Tensor
    """[N] int32, keys of each sequence."""
    runs: int
    """Programs that share a tile's keys, a run each; 1: one program for all runs."""
    span: int
    """Keys of a run."""


def span_of(longest: int) -> int:
    """Keys of a run, for sequences of up to `longest` tokens: must be the same for all passes of an engine."""
    return max(LEAST_SPAN, -(-longest // (MOST_RUNS * LEAST_SPAN)) * LEAST_SPAN)


def tile_rows(value_dim: int) -> int:
    """Pairs of a tile, by what the sums of one program may take in registers. The same for all passes."""
    return 64 if value_dim <= 128 else 32 if value_dim <= 256 else 16


def plan_decode(
    query_start: Tensor, lengths: Tensor, rows: int, group: int, value_dim: int, kv_heads: int, longest: int, span: int
) -> FixedPlan:
    """Every sequence has `rows` query rows; `longest`: host bound of the lengths. Nothing is read from the device."""
    each = -(-rows * group // tile_rows(value_dim))
    sequences = lengths.shape[0]
    tile = torch.arange(sequences * each, dtype=torch.int32, device=lengths.device)
    table = torch.stack((tile // each, tile % each * tile_rows(value_dim)))
    runs = max(1, -(-longest // span))
    few = sequences * each * kv_heads < 2 * multiprocessors(lengths.device)
    return FixedPlan(table, query_start, lengths, runs if few else 1, span)


def plan_prefill(
    query_start: Tensor, lengths: Tensor, query_lengths: Sequence[int], group: int, value_dim: int, span: int
) -> FixedPlan:
    """`query_lengths`: rows of each sequence, on the host."""
    step = tile_rows(value_dim)
    tiles = [(i, first) for i, count in enumerate(query_lengths) for first in range(0, count * group, step)]
    return FixedPlan(tile_table(tiles, 2, lengths.device), query_start, lengths, 1, span)


@triton.jit
def _merged(highest, total, acc, run_highest, run_total, run_acc):
    """Two softmaxes over different keys as one; scores in units of log2."""
    new = tl.maximum(highest, run_highest)
    old_weight = tl.exp2(highest - new)
    run_weight = tl.exp2(run_highest - new)
    total = total * old_weight + run_total * run_weight
    acc = acc * old_weight[:, None] + run_acc * run_weight[:, None]
    return new, total, acc


@triton.jit
def _place(tiles, tile_count, query_start, lengths, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr):
    """This program's tile: sequence, first row of the sequence in the batch, query row and head in the group of each pair,
    which of them are there, position of each, keys that the tile sees, runs that hold them."""
    tile = tl.program_id(0)
    sequence = tl.load(tiles + tile)
    first_pair = tl.load(tiles + tile_count + tile)
    start = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - start
    length = tl.load(lengths + sequence)
    pair = first_pair + tl.arange(0, BLOCK_M)
    query = pair // GROUP
    valid = pair < rows * GROUP
    position = length - rows + query
    last = length - rows + tl.minimum((first_pair + BLOCK_M - 1) // GROUP, rows - 1) + 1
    return sequence, start, query, pair % GROUP, valid, position, last, tl.cdiv(last, SPAN)


@triton.jit(do_not_specialize=["tile_count", "split"])
def _fixed_attention_kernel(
    out, partial, sums, q, k_pages, v_pages, page_table, lengths, query_start, tiles, tile_count, split, score_scale,
    value_scale, q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr, FIRST_KEY: tl.constexpr,
):  # fmt: skip
    """Program (tile, KV head, part). split: part is the run it does, and what it finds goes to `partial` and `sums`."""
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    sequence, start, query, member, valid, position, last, runs = _place(
        tiles, tile_count, query_start, lengths, GROUP, BLOCK_M, SPAN
    )
    head = kv_head * GROUP + member
    row = (start + query).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    q_at = q + (row * q_row + head * q_head)[:, None]
    queries = tl.load(q_at + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    if BLOCK_E > 0:
        e = tl.arange(0, BLOCK_E)
        e_mask = (BLOCK_D + e < DIM)[None, :]
        more_queries = tl.load(q_at + BLOCK_D + e[None, :], mask=valid[:, None] & e_mask, other=0.0)
    table = page_table + sequence.to(tl.int64) * table_row
    first_run = 0
    if split != 0:
        first_run = part
        runs = tl.minimum(runs, part + 1)

    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for run in range(first_run, runs):
        run_highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        run_total = tl.zeros([BLOCK_M], tl.float32)
        run_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for base in range(run * SPAN, tl.minimum(run * SPAN + SPAN, last), BLOCK_N):
            key = base + tl.arange(0, BLOCK_N)
            inside = key < last
            page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
            k_at = k_pages + (page * k_page + key % PAGE * k_slot + kv_head * k_head)[:, None]
            keys = tl.load(k_at + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0).to(queries.dtype)
            scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            if BLOCK_E > 0:
                keys = tl.load(k_at + BLOCK_D + e[None, :], mask=inside[:, None] & e_mask, other=0.0).to(queries.dtype)
                scores = dot(more_queries, tl.trans(keys), scores)
            scores = scores * score_scale
            scores = tl.where(inside[None, :] & (key[None, :] <= position[:, None]), scores, float("-inf"))
            if FIRST_KEY > 0:
                scores = tl.where(key[None, :] >= FIRST_KEY, scores, float("-inf"))
            # Finite from the start, so a row that sees none of these keys stays at weight 0 instead of NaN.
            higher = tl.maximum(run_highest, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(run_highest - higher)
            v_at = v_pages + (page * v_page + key % PAGE * v_slot + kv_head * v_head)[:, None] + dv[None, :]
            values = tl.load(v_at, mask=inside[:, None] & (dv < VALUE_DIM)[None, :], other=0.0).to(queries.dtype)
            run_total = run_total * fade + tl.sum(weights, 1)
            run_acc = dot(weights.to(queries.dtype), values, run_acc * fade[:, None])
            run_highest = higher
        highest, total, acc = _merged(highest, total, acc, run_highest, run_total, run_acc)

    store = valid[:, None] & (dv < VALUE_DIM)[None, :]
    if split != 0:
        at = ((part * tile_count + tl.program_id(0)) * tl.num_programs(1) + kv_head).to(tl.int64) * BLOCK_M
        at += tl.arange(0, BLOCK_M)
        tl.store(partial + at[:, None] * VALUE_DIM + dv[None, :], acc, mask=store)
        tl.store(sums + at * 2, highest, mask=valid)
        tl.store(sums + at * 2 + 1, total, mask=valid)
    else:
        result = acc * tl.div_rn(value_scale, tl.where(total > 0, total, 1.0))[:, None]
        at_out = out + ((row * HEADS + head) * VALUE_DIM)[:, None] + dv[None, :]
        tl.store(at_out, result.to(out.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["tile_count"])
def _merge_runs_kernel(out, partial, sums, lengths, query_start, tiles, tile_count, value_scale, GROUP: tl.constexpr,
                       HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_V: tl.constexpr):  # fmt: skip
    kv_head = tl.program_id(1)
    _, start, query, member, valid, _, _, runs = _place(tiles, tile_count, query_start, lengths, GROUP, BLOCK_M, SPAN)
    dv = tl.arange(0, BLOCK_V)
    store = valid[:, None] & (dv < VALUE_DIM)[None, :]
    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for run in range(0, runs):
        at = ((run * tile_count + tl.program_id(0)) * tl.num_programs(1) + kv_head).to(tl.int64) * BLOCK_M
        at += tl.arange(0, BLOCK_M)
        run_highest = tl.load(sums + at * 2, mask=valid, other=-1.0e30)
        run_total = tl.load(sums + at * 2 + 1, mask=valid, other=0.0)
        run_acc = tl.load(partial + at[:, None] * VALUE_DIM + dv[None, :], mask=store, other=0.0)
        highest, total, acc = _merged(highest, total, acc, run_highest, run_total, run_acc)
    result = acc * tl.div_rn(value_scale, tl.where(total > 0, total, 1.0))[:, None]
    at_out = out + (((start + query).to(tl.int64) * HEADS + kv_head * GROUP + member) * VALUE_DIM)[:, None] + dv[None, :]
    tl.store(at_out, result.to(out.dtype.element_ty), mask=store)


def fixed_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    plan: FixedPlan,
    scale: float,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    first_key: int = 0,
) -> Tensor:
    """q [T, H, D] (last dimension contiguous), k_pages [P, page, Hkv, D], v_pages [P, page, Hkv, Dv] (any dtype that converts
    to q's; with scales as in `gqa_decode`), page_table [N, W] int32 → [T, H, Dv] in q's dtype. The pass's own KV is in the
    pages already; the rows of a sequence are its last. Absorbed MLA: one KV head, values being the first part of the keys.

    Reference: `kernels.attention_fixed.fixed_order_attention`.
    """
    (tokens, heads, dim), (_, page, kv_heads, value_dim) = q.shape, v_pages.shape
    out = q.new_empty(tokens, heads, value_dim)
    (block_d, block_e), block_v = split_width(dim), max(16, power_of_2(value_dim))
    block_m, count = tile_rows(value_dim), plan.table.shape[1]
    # By types and widths only: passes must not differ in it.
    stage = (block_d + block_e + block_v) * q.element_size()
    block_n = 64
    while block_n > 16 and block_n * stage > SHARED_BYTES:
        block_n //= 2
    split = plan.runs > 1
    parts = plan.runs * count * kv_heads * block_m if split else 0
    partial = torch.empty(parts, value_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(parts, 2, dtype=torch.float32, device=q.device)
    shape = {"GROUP": heads // kv_heads, "HEADS": heads, "VALUE_DIM": value_dim, "SPAN": plan.span, "BLOCK_M": block_m,
             "BLOCK_V": block_v}  # fmt: skip
    launch(
        _fixed_attention_kernel, (count, kv_heads, plan.runs), out, partial, sums, q, k_pages, v_pages, page_table,
        plan.lengths, plan.query_start, plan.table, count, int(split), scale * k_scale * math.log2(math.e), v_scale,
        q.stride(0), q.stride(1), *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0),
        **shape, DIM=dim, PAGE=page, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_E=block_e, FIRST_KEY=first_key,
        num_warps=8 if block_v > 128 else 4, num_stages=2, **_NO_FMA,
    )  # fmt: skip
    if split:
        launch(
            _merge_runs_kernel, (count, kv_heads), out, partial, sums, plan.lengths, plan.query_start, plan.table, count,
            v_scale, **shape, num_warps=8 if block_v > 128 else 4, **_NO_FMA,
        )  # fmt: skip
    return out
