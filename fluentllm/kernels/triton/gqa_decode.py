"""Attention of decode and verification over paged KV with grouped heads: each item of the plan by one program, then a merge,
by a launch of its own or by the last program of a sequence to finish (`gqa_plan.MERGE_INSIDE`).

Queries come rotated, with their keys in the cache, or as the QKV product leaves them (`QkvProduct`): then each program norms
and rotates the queries that it needs, and whoever's run holds a new token's place writes its key and value first.

Where registers hold a block of keys and values (`holds`), each program asks for its last ones before it waits for the product
of its queries: they are older than this pass, and so are the plan and the page table (`gqa_plan`).

The arithmetic is FlashAttention's (arXiv:2205.14135) with keys split among programs; scores are kept in units of log2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .gqa_plan import BLOCK, GqaPlan
from .language import FIRST, LOADED, dot, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic, split_width
from .qkv_product import opened, with_new, write_new
from .rotate import head_weight, heads_and_partners, normed_and_rotated, partner, rotary_factors

if TYPE_CHECKING:
    from torch import Tensor

    from .qkv_product import QkvProduct

HOLD = True
"""False: nothing is read before the kernels in front have finished (benchmarks/kernels/launches.py compares)."""
SHARED_BYTES = 100 * 1024
"""Of shared memory for keys and values in flight: two programs fit on a multiprocessor of Hopper."""


@triton.jit
def _softmax_step(queries, keys, more_scores, values, visible, score_scale, highest, total, acc):
    """One block of keys [N, D] and values [N, V] more; more_scores: what the rest of a head's width adds."""
    scores = tl.where(visible, dot(queries, tl.trans(keys), more_scores) * score_scale, float("-inf"))
    # Finite from the start, so a row that sees none of these keys stays at weight 0 instead of NaN.
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(highest - higher)
    total = total * fade + tl.sum(weights, 1)
    acc = dot(weights.to(queries.dtype), values, acc * fade[:, None])
    return higher, total, acc


@triton.jit
def _decode_kernel(
    out, partial, lse, counters, q, k_pages, v_pages, page_table, lengths, items, starts, spans, score_scale, value_scale,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row,
    cos, sin, q_weight, k_weight, kv_rows, eps, rope_row, NEW: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILES: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, SINGLE: tl.constexpr,
    FIRST_KEY: tl.constexpr, HOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NEW: 0, or ROWS rounded up: q is the QKV product."""
    kv_head = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    item = tl.program_id(1)
    start_next(PDL, FIRST)
    if not HOLD:
        wait_for_inputs(PDL)
    sequence = tl.load(items + item)
    if sequence >= 0:
        length = tl.load(lengths + sequence)
        start_item = tl.load(starts + sequence)
        span = tl.load(spans + sequence)
        first = (item - start_item) * span
        last = tl.minimum(first + span, length)

        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < ROWS * GROUP
        query = m // GROUP
        head = kv_head * GROUP + m % GROUP
        position = length - ROWS + query
        d = tl.arange(0, BLOCK_D)
        dv = tl.arange(0, BLOCK_V)
        token = (sequence * ROWS + query).to(tl.int64)
        q_at = q + (token * q_row + head * q_head)[:, None]
        in_head = (d < DIM)[None, :]
        position0 = length - ROWS
        if NEW > 0:
            other = partner(d, ROTARY, INTERLEAVED)
            if q_weight is not None:
                q_factor, q_partner_factor = head_weight(q_weight, d, DIM), head_weight(q_weight, other, DIM)
                k_factor, k_partner_factor = head_weight(k_weight, d, DIM), head_weight(k_weight, other, DIM)
            rope = (token * rope_row)[:, None]
            q_cos, q_sin = rotary_factors(cos + rope, sin + rope, valid[:, None] & in_head, d, ROTARY)
            # Of the new tokens this run may hold some, all or, mostly, none.
            j = tl.arange(0, NEW)
            mine = (j < ROWS) & (position0 + j >= first) & (position0 + j < last)
            new_token = (sequence * ROWS + j).to(tl.int64)
            new = mine[:, None] & in_head
            rope = (new_token * rope_row)[:, None]
            k_cos, k_sin = rotary_factors(cos + rope, sin + rope, new, d, ROTARY)
            target = tl.load(kv_rows + new_token, mask=mine, other=0).to(tl.int64)
        table = page_table + sequence.to(tl.int64) * table_row
        end = last
        if HOLD:
            # The last block is read now, but for what this pass writes of it.
            end = first + tl.maximum(tl.cdiv(last - first, BLOCK_N) - 1, 0) * BLOCK_N
            held_key = end + tl.arange(0, BLOCK_N)
            page = tl.load(table + held_key // PAGE, mask=held_key < last, other=0).to(tl.int64)
            held_k_at = k_pages + (page * k_page + held_key % PAGE * k_slot + kv_head * k_head)[:, None] + d[None, :]
            held_v_at = v_pages + (page * v_page + held_key % PAGE * v_slot + kv_head * v_head)[:, None] + dv[None, :]
            old = (held_key < tl.minimum(last, position0))[:, None]
            held_keys = tl.load(held_k_at, mask=old & (d < DIM)[None, :], other=0.0)
            held_values = tl.load(held_v_at, mask=old & (dv < VALUE_DIM)[None, :], other=0.0)
            wait_for_inputs(PDL)
        if NEW == 0:
            queries = tl.load(q_at + d[None, :], mask=valid[:, None] & in_head, other=0.0)
            if HOLD:
                fresh = ((held_key >= position0) & (held_key < last))[:, None]
                held_keys = tl.where(fresh, tl.load(held_k_at, mask=fresh & (d < DIM)[None, :], other=0.0), held_keys)
                held_values = tl.where(
                    fresh, tl.load(held_v_at, mask=fresh & (dv < VALUE_DIM)[None, :], other=0.0), held_values
                )
        else:
            x, p = heads_and_partners(q_at, valid[:, None] & in_head, d, ROTARY, INTERLEAVED)
            new_at = q + (new_token * q_row + (HEADS + kv_head) * DIM)[:, None]
            new_k, new_p = heads_and_partners(new_at, new, d, ROTARY, INTERLEAVED)
            new_v = tl.load(new_at + HEADS // GROUP * DIM + d[None, :], mask=new, other=0.0)
            if q_weight is None:
                queries = normed_and_rotated(x, p, None, None, q_cos, q_sin, eps, DIM)
                new_k = normed_and_rotated(new_k, new_p, None, None, k_cos, k_sin, eps, DIM)
            else:
                queries = normed_and_rotated(x, p, q_factor, q_partner_factor, q_cos, q_sin, eps, DIM)
                new_k = normed_and_rotated(new_k, new_p, k_factor, k_partner_factor, k_cos, k_sin, eps, DIM)
            # Not for what it does (the rows are zeros): it keeps the compiler from bringing queries, partners, cos and sin into
            # the dot product's layout one by one, which takes 100 registers.
            queries = tl.where(valid[:, None], queries, 0.0)
            new_k, new_v = write_new(
                new_k, new_v, k_pages + kv_head * k_head, v_pages + kv_head * v_head, target, new, d, k_page, k_slot, v_page,
                v_slot, PAGE,
            )  # fmt: skip
            if HOLD:
                held_keys = with_new(held_keys, new_k, held_key, position0, ROWS, NEW)
                held_values = with_new(held_values, new_v, held_key, position0, ROWS, NEW)
        if BLOCK_E > 0:
            e = tl.arange(0, BLOCK_E)
            e_mask = (BLOCK_D + e < DIM)[None, :]
            q_at = q + BLOCK_D + ((sequence * ROWS + query).to(tl.int64) * q_row + head * q_head)[:, None] + e[None, :]
            more_queries = tl.load(q_at, mask=valid[:, None] & e_mask, other=0.0)

        highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if HOLD:
            visible = (held_key < last)[None, :] & (held_key[None, :] <= position[:, None])
            if FIRST_KEY > 0:
                visible &= (held_key >= FIRST_KEY)[None, :]
            highest, total, acc = _softmax_step(
                queries, held_keys.to(queries.dtype), tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
                held_values.to(queries.dtype), visible, score_scale, highest, total, acc,
            )  # fmt: skip
        # Page numbers are fetched one block ahead, so that loads of keys wait for no other load and stay several in flight.
        ahead = first + tl.arange(0, BLOCK_N)
        next_page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
        for base in range(first, end, BLOCK_N):
            key = base + tl.arange(0, BLOCK_N)
            inside = key < end
            page = next_page.to(tl.int64)
            ahead = key + BLOCK_N
            next_page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
            slot = key % PAGE
            more_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if BLOCK_E > 0:
                k_at = k_pages + BLOCK_D + (page * k_page + slot * k_slot + kv_head * k_head)[:, None] + e[None, :]
                keys = tl.load(k_at, mask=inside[:, None] & e_mask, other=0.0).to(queries.dtype)
                more_scores = dot(more_queries, tl.trans(keys), more_scores)
            k_at = k_pages + (page * k_page + slot * k_slot + kv_head * k_head)[:, None] + d[None, :]
            keys = tl.load(k_at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0).to(queries.dtype)
            v_at = v_pages + (page * v_page + slot * v_slot + kv_head * v_head)[:, None] + dv[None, :]
            values = tl.load(v_at, mask=inside[:, None] & (dv < VALUE_DIM)[None, :], other=0.0).to(queries.dtype)
            visible = inside[None, :] & (key[None, :] <= position[:, None])
            if FIRST_KEY > 0:
                visible &= (key >= FIRST_KEY)[None, :]
            highest, total, acc = _softmax_step(queries, keys, more_scores, values, visible, score_scale, highest, total, acc)

        start_next(PDL, LOADED)
        result = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
        row = query * HEADS + head
        store = valid[:, None] & (dv < VALUE_DIM)[None, :]
        if SINGLE:
            alone = True
        else:
            alone = tl.load(starts + sequence + 1) - start_item == 1
        if alone:
            at = out + ((sequence * (ROWS * HEADS) + row).to(tl.int64) * VALUE_DIM)[:, None] + dv[None, :]
            tl.store(at, result.to(out.dtype.element_ty), mask=store)
        elif not SINGLE:
            slot_row = (item * (ROWS * HEADS) + row).to(tl.int64)
            tl.store(partial + (slot_row * VALUE_DIM)[:, None] + dv[None, :], result, mask=store)
            tl.store(lse + slot_row, highest + tl.log2(total), mask=valid)
            if counters is not None:
                # All threads' sums are written before the one that counts says so.
                tl.debug_barrier()
                counter = counters + sequence * tl.num_programs(0) + tl.program_id(0)
                runs = tl.load(starts + sequence + 1) - start_item
                if tl.atomic_add(counter, 1, sem="acq_rel") == runs - 1:
                    tl.store(counter, 0)
                    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
                    for run in range(start_item, start_item + runs):
                        at_lse = lse + (run * (ROWS * HEADS) + row).to(tl.int64)
                        known = tl.load(at_lse, mask=valid, other=float("-inf"), cache_modifier=".cg")
                        highest = tl.maximum(highest, known)
                    total = tl.zeros([BLOCK_M], tl.float32)
                    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
                    for run in range(start_item, start_item + runs):
                        slot_row = (run * (ROWS * HEADS) + row).to(tl.int64)
                        known = tl.load(lse + slot_row, mask=valid, other=float("-inf"), cache_modifier=".cg")
                        weight = tl.exp2(known - highest)
                        at_values = partial + (slot_row * VALUE_DIM)[:, None] + dv[None, :]
                        acc += tl.load(at_values, mask=store, other=0.0, cache_modifier=".cg") * weight[:, None]
                        total += weight
                    result = acc / tl.where(total > 0, total, 1.0)[:, None]
                    at = out + ((sequence * (ROWS * HEADS) + row).to(tl.int64) * VALUE_DIM)[:, None] + dv[None, :]
                    tl.store(at, result.to(out.dtype.element_ty), mask=store)


@triton.jit
def _merge_kernel(out, partial, lse, starts, COUNT: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_V: tl.constexpr, RUNS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows of one sequence: COUNT = query rows × heads. Sequences with one item are left alone: it wrote their output. The plan
    is older than what this waits for."""
    sequence = tl.program_id(1)
    start_next(PDL, FIRST)
    first = tl.load(starts + sequence)
    last = tl.load(starts + sequence + 1)
    wait_for_inputs(PDL)
    if last - first > 1:
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = row < COUNT
        dv = tl.arange(0, BLOCK_V)
        run = tl.arange(0, RUNS)
        highest = tl.full([BLOCK_R], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        # A run's values are asked for with its logarithm, not after it: nobody waits twice.
        for base in range(first, last, RUNS):
            item = base + run
            at = (item[:, None] * COUNT + row[None, :]).to(tl.int64)
            present = (item < last)[:, None] & valid[None, :]
            known = tl.load(lse + at, mask=present, other=float("-inf"))
            at_values = partial + at[:, :, None] * VALUE_DIM + dv[None, None, :]
            values = tl.load(at_values, mask=present[:, :, None] & (dv < VALUE_DIM)[None, None, :], other=0.0)
            higher = tl.maximum(highest, tl.max(known, 0))
            weight = tl.exp2(known - higher[None, :])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(weight, 0)
            acc = acc * fade[:, None] + tl.sum(values * weight[:, :, None], 0)
            highest = higher
        start_next(PDL, LOADED)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        at_out = out + ((sequence * COUNT + row).to(tl.int64) * VALUE_DIM)[:, None] + dv[None, :]
        tl.store(at_out, result.to(out.dtype.element_ty), mask=valid[:, None] & (dv < VALUE_DIM)[None, :])


def query_tiles(rows: int, group: int) -> tuple[int, int]:
    """Rows of a tile of queries, and tiles, of `rows` query rows with `group` heads a KV head."""
    block_m = min(64, max(16, power_of_2(rows * group)))
    return block_m, -(-rows * group // block_m)


def holds(block_m: int, width: int, key_bytes: int) -> bool:
    """Do the registers of a program with so many rows, of which two fit on a multiprocessor, hold a block of keys and values of
    heads of this width, of so many bytes a value, too?"""
    return HOLD and block_m <= 16 and width <= 128 and key_bytes <= 2


def gqa_decode(
    q: Tensor | QkvProduct,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    plan: GqaPlan,
    rows: int,
    scale: float,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    first_key: int = 0,
) -> Tensor:
    """q [N · rows, H, D] (last dimension contiguous), k_pages [P, page, Hkv, D], v_pages [P, page, Hkv, Dv] (any
    dtype that converts to q's, float8_e4m3fn included: then the values are multiplied by `k_scale` and `v_scale`), page_table
    [N, W] int32, lengths [N] int32 → [N · rows, H, Dv] in q's dtype.

    Row j of a sequence stands at position length - rows + j and sees the keys up to there, its own included. A sequence of
    length 0 gets zeros. Keys before `first_key` are not seen. `plan` is `plan_gqa` of the same lengths. Of a `QkvProduct`
    keys and values are written to the pages first, unscaled. Reference: `kernels.attention_reference.gqa_reference`.
    """
    (_, page, kv_heads, value_dim), dim = v_pages.shape, k_pages.shape[3]
    found = opened(q, rows, dim, value_dim)
    q, heads, count = found.tensor, found.heads, found.tensor.shape[0]
    group = heads // kv_heads
    if heads % kv_heads or count != rows * lengths.shape[0] or not 1 <= rows <= 8:
        raise ValueError(
            f"{count} rows of {heads} heads do not fit {lengths.shape[0]} sequences × {rows} and {kv_heads} KV heads"
        )
    out = q.new_empty(count, heads, value_dim)
    per_sequence = rows * heads
    items = plan.items.shape[0]
    parts = 0 if plan.single else items
    partial = torch.empty(parts, per_sequence, value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(parts, per_sequence, dtype=torch.float32, device=q.device)
    block_m, tiles = query_tiles(rows, group)
    if plan.counters is not None and plan.counters.shape[0] < lengths.shape[0] * kv_heads * tiles:
        raise ValueError(f"the plan was made for fewer than {tiles} tiles of queries")
    (block_d, block_e), block_v = split_width(dim), max(16, power_of_2(value_dim))
    block_n = BLOCK
    stage = (block_d + block_e + block_v) * k_pages.element_size()
    while block_n > 16 and block_n * stage > SHARED_BYTES:
        block_n //= 2
    hold = block_e == 0 and holds(block_m, max(block_d, block_v), k_pages.element_size())
    launch(
        _decode_kernel, (kv_heads * tiles, items), out, partial, lse, plan.counters, q, k_pages, v_pages, page_table, lengths,
        plan.items, plan.starts, plan.spans, scale * k_scale * math.log2(math.e), v_scale,
        q.stride(0), found.head_stride, *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0), *found.operands,
        **found.options, ROWS=rows, GROUP=group, HEADS=heads, DIM=dim, VALUE_DIM=value_dim, TILES=tiles, PAGE=page,
        BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_E=block_e, BLOCK_V=block_v, SINGLE=plan.single, FIRST_KEY=first_key,
        HOLD=hold,
        num_warps=4, num_stages=1 + max(1, min(3, SHARED_BYTES // (block_n * stage))),
        **programmatic(q.device, "product"),
    )  # fmt: skip
    if plan.single or plan.counters is not None:
        return out
    sequences = lengths.shape[0]
    # Few rows: one a program, many runs in flight. Many rows: most have nothing to merge, so fewer programs.
    block_r, runs = (1, 16) if sequences * per_sequence <= 2048 else (8, 2)
    launch(
        _merge_kernel, (-(-per_sequence // block_r), sequences), out, partial, lse, plan.starts,
        COUNT=per_sequence, VALUE_DIM=value_dim, BLOCK_R=block_r, BLOCK_V=block_v, RUNS=runs, num_warps=2,
        **programmatic(q.device),
    )  # fmt: skip
    return out
