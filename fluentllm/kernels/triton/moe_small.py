"""Experts of a few tokens: no sorting, no tiles; programs read the rows of the chosen experts' matrices and nothing else.

Weights are multiplied as they arrive, so many loads are in flight; two launches, the second of which adds everything up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, silu_of_rounded, start_next, wait_for_inputs
from .launch import launch, programmatic
from .normed import leave_row, left, opened_after

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import NormAfter, Normed


@triton.jit
def _gate_up_kernel(out, x, w, ids, x_row, w_expert, w_row, EXPERTS: tl.constexpr, INNER: tl.constexpr, HIDDEN: tl.constexpr,
                    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
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
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    steps: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):
        pair = token * TOP_K + step // steps
        base = step % steps * BLOCK_K
        expert = tl.load(ids + pair).to(tl.int64)
        mask = base + k < tl.where(expert < EXPERTS, INNER, 0)
        a = tl.load(h + pair * INNER + base + k, mask=mask, other=0.0).to(tl.float32) * tl.load(weights + pair)
        at = w + expert * w_expert + (n.to(tl.int64) * w_row)[:, None] + (base + k)[None, :]
        acc += tl.load(at, mask=(n < HIDDEN)[:, None] & mask[None, :], other=0.0).to(tl.float32) * a[None, :]
    start_next(PDL, LOADED)
    total = tl.sum(acc, 1)
    kept = 0.0
    for i in tl.static_range(TOP_K):
        zero = tl.load(ids + token * TOP_K + i) >= EXPERTS
        kept += tl.where(zero, tl.load(weights + token * TOP_K + i), 0.0)
    total += kept * tl.load(x + token * x_row + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
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
    block_n, block_k = 4, 512
    launch(
        _gate_up_kernel, (tokens * top_k, -(-inner // block_n)), h, x, gate_up, ids, x.stride(0), *gate_up.stride()[:2],
        EXPERTS=experts, INNER=inner, HIDDEN=hidden, TOP_K=top_k, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3, num_warps=4,
        **programmatic(x.device, "experts"),
    )  # fmt: skip
    blocks = -(-hidden // block_n)
    residual, norm, squares = opened_after(after, blocks, tokens)
    launch(
        _down_kernel, (tokens, blocks), out, h, down, x, shared, weights, ids, residual, norm, squares, tokens, x.stride(0),
        0 if shared is None else shared.stride(0), 0 if residual is None else residual.stride(0), *down.stride()[:2],
        EXPERTS=experts, INNER=inner, HIDDEN=hidden, TOP_K=top_k, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3, num_warps=4,
        **programmatic(x.device, "experts"),
    )  # fmt: skip
    return left(out, squares, after)
