"""Activations to E4M3, one float32 scale a token and 128 columns: on their own, or of SwiGLU's product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..block_fp8 import BLOCK, E4M3, LARGEST, LEAST_SCALE
from .language import FIRST, LOADED, silu_of_rounded, start_next, wait_for_inputs
from .launch import launch, programmatic

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = 4
"""Blocks of 128 of one program: few, so that one token's row spreads over the chip."""


@triton.jit(do_not_specialize=["scale_row"])
def _quantise_kernel(out, scale, x, K, x_row, out_row, scale_row, largest, least, GATED: tl.constexpr, GROUPS: tl.constexpr,
                     BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = x + token * x_row + k
    value = tl.load(at, mask=k < K, other=0.0)
    if GATED:
        value = silu_of_rounded(value.to(tl.float32), tl.load(at + K, mask=k < K, other=0.0).to(tl.float32), value.dtype)
        value = value.to(x.dtype.element_ty)
    start_next(PDL, LOADED)
    value = value.to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(value), 1) / largest, least)
    q = tl.minimum(tl.maximum(value / s[:, None], -largest), largest)
    tl.store(out + token * out_row + k, q.to(out.dtype.element_ty), mask=k < K)
    tl.store(scale + group * scale_row + token, s, mask=group * BLOCK < K)


def _quantise(x: Tensor, gated: bool, multiple: int = 1) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    columns = columns // 2 if gated else columns
    blocks = -(-columns // BLOCK)
    rows = -(-tokens // multiple) * multiple
    q = torch.empty(rows, columns, dtype=E4M3, device=x.device)
    scale = torch.empty(blocks, rows, dtype=torch.float32, device=x.device)
    launch(
        _quantise_kernel, (tokens, -(-blocks // GROUPS)), q, scale, x, columns, x.stride(0), columns, rows, LARGEST,
        LEAST_SCALE, GATED=gated, GROUPS=GROUPS, BLOCK=BLOCK, num_warps=2, **programmatic(x.device),
    )  # fmt: skip
    return q, scale


def quantise_rows(x: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, K], last dimension contiguous → E4M3 [T, K], scale float32 [⌈K / 128⌉, T]. With `multiple` T is rounded up to it;
    what is in the rows that nobody asked for is not written.

    Reference: `kernels.block_fp8.quantise_rows_reference`."""
    return _quantise(x, False, multiple)


def silu_mul_quantise(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up [T, 2 I] → silu(gate) · up, rounded to gate_up's dtype and then quantised: E4M3 [T, I], scale [⌈I / 128⌉, T]."""
    return _quantise(gate_up, True)
