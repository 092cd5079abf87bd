"""Adding up what a token's experts computed: weights, zero experts and shared experts, in the order of choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .normed import leave_row, left, opened_after

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import NormAfter, Normed


@triton.jit(do_not_specialize=["tokens"])
def _combine_kernel(out, y, x, shared, weights, ids, residual, norm, squares, tokens, x_row, shared_row, residual_row,
                    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK], tl.float32)
    kept = 0.0
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        weight = tl.load(weights + pair)
        computed = tl.load(ids + pair) < EXPERTS
        # Rows of zero experts were never written.
        acc += weight * tl.load(y + pair * SIZE + i, mask=i < tl.where(computed, SIZE, 0), other=0.0).to(tl.float32)
        kept += tl.where(computed, 0.0, weight)
    if kept != 0.0:
        acc += kept * tl.load(x + token * x_row + i, mask=inside, other=0.0).to(tl.float32)
    if shared is not None:
        acc += tl.load(shared + token * shared_row + i, mask=inside, other=0.0).to(tl.float32)
    start_next(PDL, LOADED)
    total = acc.to(out.dtype.element_ty)
    if norm is not None:
        total = leave_row(total, residual, norm, squares, token, tl.program_id(1), i, inside, tokens, residual_row)
    tl.store(out + token * SIZE + i, total, mask=inside)


def combine(
    y: Tensor,
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    shared: Tensor | None = None,
    after: NormAfter | None = None,
) -> Tensor | Normed:
    """y [T · K, hidden], what each pair's expert made; x [T, hidden], what zero experts (ids of `experts` or more) return;
    weights, ids [T, K], contiguous; shared [T, hidden] is added → [T, hidden]. Reference: `kernels.moe.combine_reference`.

    after: its residual gets the sum, and the result is that, normed but for its factor."""
    tokens, size = x.shape
    out = x.new_empty(tokens, size)
    block = min(1024, power_of_2(size))
    blocks = -(-size // block)
    residual, norm, squares = opened_after(after, blocks, tokens)
    launch(
        _combine_kernel, (tokens, blocks), out, y, x, shared, weights, ids, residual, norm, squares, tokens, x.stride(0),
        0 if shared is None else shared.stride(0), 0 if residual is None else residual.stride(0), EXPERTS=experts,
        TOP_K=ids.shape[1], SIZE=size, BLOCK=block, num_warps=4, **programmatic(x.device),
    )  # fmt: skip
    return left(out, squares, after)
