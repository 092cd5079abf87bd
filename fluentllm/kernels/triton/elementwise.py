"""Small operations between products: SwiGLU's gate, rotary on its own, the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, silu, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _silu_mul_kernel(out, gate_up, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    gate = tl.load(gate_up + row * row_stride + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    start_next(PDL, LOADED)
    tl.store(out + row * SIZE + i, (silu(gate) * up).to(out.dtype.element_ty), mask=i < SIZE)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] → silu(gate) · up [T, I]. Reference: `PlainOps.silu_mul`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    block = min(1024, power_of_2(size))
    launch(
        _silu_mul_kernel, (rows, -(-size // block)), out, gate_up, gate_up.stride(0), SIZE=size, BLOCK=block, num_warps=4,
        **programmatic(gate_up.device),
    )  # fmt: skip
    return out


@triton.jit
def _rotary_kernel(out, x, cos, sin, heads, x_row, x_head, rope_row, DIM: tl.constexpr, ROTARY: tl.constexpr,
                   INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    rotates = d < ROTARY
    if INTERLEAVED:
        partner = tl.where(rotates, d ^ 1, d)
    else:
        partner = tl.where(rotates, tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2), d)
    inside = (head < heads)[:, None] & (d < DIM)[None, :]
    base = x + token * x_row + (head * x_head)[:, None]
    value = tl.load(base + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(base + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * rope_row + d, mask=rotates, other=1.0).to(tl.float32)
    s = tl.load(sin + token * rope_row + d, mask=rotates, other=0.0).to(tl.float32)
    at = out + ((token * heads + head) * DIM)[:, None] + d[None, :]
    tl.store(at, (value * c[None, :] + other * s[None, :]).to(out.dtype.element_ty), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x [T, H, D], last dimension contiguous; cos and sin [T, 1, R], R ≤ D → [T, H, D]. Reference: `PlainOps.rotary`."""
    tokens, heads, dim = x.shape
    out = x.new_empty(tokens, heads, dim)
    block_d = power_of_2(dim)
    block_h = max(1, min(power_of_2(heads), 1024 // block_d))
    launch(
        _rotary_kernel, (tokens, -(-heads // block_h)), out, x, cos, sin, heads, x.stride(0), x.stride(1), cos.stride(0),
        DIM=dim, ROTARY=cos.shape[-1], INTERLEAVED=interleaved, BLOCK_D=block_d, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _embedding_kernel(out, tokens, table, table_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row).to(tl.int64)
    tl.store(out + row * SIZE + i, tl.load(table + token * table_row + i, mask=i < SIZE), mask=i < SIZE)


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """tokens [T] integers, table [V, D] → [T, D]. Reference: `torch.nn.functional.embedding`."""
    size = table.shape[1]
    out = table.new_empty(tokens.shape[0], size)
    block = min(1024, power_of_2(size))
    launch(
        _embedding_kernel, (tokens.shape[0], -(-size // block)), out, tokens, table, table.stride(0),
        SIZE=size, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
