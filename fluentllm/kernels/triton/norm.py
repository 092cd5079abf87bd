"""RMS norm, alone, after adding to the residual stream, or of what a draft layer begins with: one program a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _rms_norm_kernel(out, x, delta, weight, eps, groups, x_row, x_group, delta_row, out_row,
                     SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Row i is group i % groups of token i // groups."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    start_next(PDL, FIRST)
    factor = tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    at = x + row // groups * x_row + row % groups * x_group + i
    value = tl.load(at, mask=i < SIZE, other=0.0)
    start_next(PDL, LOADED)
    if delta is not None:
        # The sum has the stream's dtype, as an addition of its own would leave it.
        value = (value.to(tl.float32) + tl.load(delta + row * delta_row + i, mask=i < SIZE, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(at, value, mask=i < SIZE)
    y = value.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps) * factor
    tl.store(out + row * out_row + i, y.to(out.dtype.element_ty), mask=i < SIZE)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D] or [T, H, D], last dimension contiguous, weight [D] → the same shape, contiguous.

    Reference: `PlainOps.rms_norm`."""
    size = x.shape[-1]
    groups = x.shape[1] if x.ndim == 3 else 1
    out = x.new_empty(x.shape)
    block = power_of_2(size)
    launch(
        _rms_norm_kernel, (x.shape[0] * groups,), out, x, None, weight, eps, groups, x.stride(0),
        x.stride(1) if x.ndim == 3 else 0, 0, size, SIZE=size, BLOCK=block, num_warps=_warps(block), **programmatic(x.device),
    )  # fmt: skip
    return out


def add_rms_norm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual [T, D] += delta [T, D], in place; → rms_norm(residual). Reference: `PlainOps.add_rms_norm`."""
    size = residual.shape[-1]
    out = residual.new_empty(residual.shape)
    block = power_of_2(size)
    launch(
        _rms_norm_kernel, (residual.shape[0],), out, residual, delta, weight, eps, 1, residual.stride(0), 0, delta.stride(0),
        size, SIZE=size, BLOCK=block, num_warps=_warps(block), **programmatic(residual.device),
    )  # fmt: skip
    return out


@triton.jit
def _draft_input_kernel(out, tokens, positions, table, hidden, token_norm, hidden_norm, eps, table_row, hidden_row,
                      SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Grid (rows, 2): the token's half of a row, then that of the state."""
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    start_next(PDL, FIRST)
    factor = tl.load((token_norm if half == 0 else hidden_norm) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    at = table + tl.load(tokens + row) * table_row
    there = half * 0 + SIZE
    if half == 1:
        at = hidden + row * hidden_row
        # No state comes before position 0: zeros, whose norm is zeros.
        there = tl.where(tl.load(positions + row) == 0, 0, SIZE)
    y = tl.load(at + i, mask=i < there, other=0.0).to(tl.float32)
    start_next(PDL, LOADED)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps) * factor
    tl.store(out + row * (2 * SIZE) + half * SIZE + i, y.to(out.dtype.element_ty), mask=i < SIZE)


def draft_input(
    tokens: Tensor, positions: Tensor, table: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float
) -> Tensor:
    """tokens, positions [T] int64, table [V, D], hidden [T, D], rows contiguous in both, norms [D] → [T, 2 D]. All but the
    first two of one dtype. Reference: `PlainOps.draft_input`."""
    rows, size = hidden.shape
    out = hidden.new_empty(rows, 2 * size)
    block = power_of_2(size)
    launch(
        _draft_input_kernel, (rows, 2), out, tokens, positions, table, hidden, token_norm, hidden_norm, eps, table.stride(0),
        hidden.stride(0), SIZE=size, BLOCK=block, num_warps=_warps(block), **programmatic(hidden.device),
    )  # fmt: skip
    return out
