"""Experts of a few tokens: no sorting, no tiles; programs read the rows of the chosen experts' matrices and nothing else.

Two launches, the second of which adds everything up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .held import held_partial, held_pieces, held_row, vector
from .language import FIRST, LOADED, silu_of_rounded, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .normed import leave_row, left, opened_after

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import NormAfter, Normed


@triton.jit
def _gate_up_kernel(out, x, w, ids, x_row, w_expert, w_row, EXPERTS: tl.constexpr, INNER: tl.constexpr, HIDDEN: tl.constexpr,
                    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    # Not before the wait: who starts early relies on what this one has waited for.
    start_next(PDL, FIRST)
    expert = tl.load(ids + pair).to(tl.int64)
    if expert < EXPERTS:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row = x + pair // TOP_K * x_row
        at = w + expert * w_expert + (n.to(tl.int64) * w_row)[:, None] + k[None, :]
        gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for base in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            mask = (n < INNER)[:, None] & (base + k < HIDDEN)[None, :]
            a = tl.load(row + base + k, mask=base + k < HIDDEN, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(at + base, mask=mask, other=0.0).to(tl.float32) * a
            up += tl.load(at + INNER * w_row + base, mask=mask, other=0.0).to(tl.float32) * a
        start_next(PDL, LOADED)
        h = silu_of_rounded(tl.sum(gate, 1), tl.sum(up, 1), out.dtype.element_ty)
        tl.store(out + pair * INNER + n, h.to(out.dtype.element_ty), mask=n < INNER)


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(out, h, w, x, shared, weights, ids, residual, norm, squares, tokens, x_row, shared_row, residual_row, w_expert,
                 w_row, EXPERTS: tl.constexpr, INNER: tl.constexpr, HIDDEN: tl.constexpr, TOP_K: tl.constexpr,
                 ROWS: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One token's output at ROWS columns, from all its experts: their weights are asked for at once, while `_gate_up_kernel`
    still runs, and held (`held.py`)."""
    pieces: tl.constexpr = (INNER + DEPTH - 1) // DEPTH
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start_next(PDL, FIRST)
    # The kernel in front lets this one start behind its own wait: so the choice of experts has been made.
    factors, ends, held, kept = (), (), (), 0.0
    for i in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + i).to(tl.int64)
        factor = tl.load(weights + token * TOP_K + i).to(tl.float32)
        kept += tl.where(expert < EXPERTS, 0.0, factor)
        factors = factors + (factor,)
        # Of a zero expert nothing is read: nobody wrote its h.
        ends = ends + (tl.where(expert < EXPERTS, tokens * TOP_K, 0),)
        rows = tl.where(expert < EXPERTS, HIDDEN, 0)
        held = held + (held_pieces(w + expert * w_expert, n, rows, INNER, w_row, DEPTH, pieces, VECTOR),)
    wait_for_inputs(PDL)
    acc = tl.zeros([ROWS, DEPTH // VECTOR], tl.float32)
    for i in tl.static_range(TOP_K):
        row = held_row(h, token * TOP_K + i, ends[i], INNER, INNER, DEPTH, pieces, VECTOR)
        acc += factors[i] * held_partial(held[i], None, row, pieces)
    start_next(PDL, LOADED)
    total = tl.sum(acc, 1) + kept * tl.load(x + token * x_row + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
    if shared is not None:
        total += tl.load(shared + token * shared_row + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
    y = total.to(out.dtype.element_ty)
    if norm is not None:
        y = leave_row(y, residual, norm, squares, token, tl.program_id(1), n, n < HIDDEN, tokens, residual_row)
    tl.store(out + token * HIDDEN + n, y, mask=n < HIDDEN)


def small_moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: Tensor | None = None,
    after: NormAfter | None = None,
) -> Tensor | Normed:
    """As `moe.experts`, for a few tokens: a matrix is read once for each pair that chose it. Reference:
    `kernels.moe.combine_reference`."""
    (tokens, hidden), (experts, _, inner), top_k = x.shape, down.shape, ids.shape[1]
    h = x.new_empty(tokens * top_k, inner)
    out = x.new_empty(tokens, hidden)
    block_n, block_k, columns = 4, 512, vector(down.element_size())
    launch(
        _gate_up_kernel, (tokens * top_k, -(-inner // block_n)), h, x, gate_up, ids, x.stride(0), *gate_up.stride()[:2],
        EXPERTS=experts, INNER=inner, HIDDEN=hidden, TOP_K=top_k, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3, num_warps=4,
        **programmatic(x.device, "few experts"),
    )  # fmt: skip
    # 64 registers of weights a thread with DeepSeek-V3-Lite's eight experts of 1,408 columns, 48 with LongCat's 12 of 1,024.
    rows, depth = 2, min(1024, power_of_2(inner))
    blocks = -(-hidden // rows)
    residual, norm, squares = opened_after(after, blocks, tokens)
    launch(
        _down_kernel, (tokens, blocks), out, h, down, x, shared, weights, ids, residual, norm, squares, tokens, x.stride(0),
        0 if shared is None else shared.stride(0), 0 if residual is None else residual.stride(0), *down.stride()[:2],
        EXPERTS=experts, INNER=inner, HIDDEN=hidden, TOP_K=top_k, ROWS=rows, DEPTH=max(columns, depth), VECTOR=columns,
        num_warps=8, **programmatic(x.device, "few experts"),
    )  # fmt: skip
    return left(out, squares, after)
