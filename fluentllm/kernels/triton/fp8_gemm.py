"""y = x Wᵀ in block FP8 for many rows: E4M3 matrix instructions over 128 columns, then promotion to float32 with both scales.

The tensor cores add E4M3 products up in fewer bits than float32, so a sum never runs over more than one block of 128 columns.
While one program of a multiprocessor promotes, another one's matrix instructions run: tiles are small enough for two or three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import bulk_copies, descriptor, launch, programmatic

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class GemmTile:
    rows: int = 64
    columns: int = 128
    """At most 128: one weight scale a step."""
    warps: int = 4
    stages: int = 3
    group: int = 8
    """Tiles of rows that share the columns of W in L2."""
    registers: int | None = None
    """At most so many a thread."""


@triton.jit
def _fp8_gemm_kernel(out, x_box, x_scale, w_box, w_scale, M, N, K, scale_row, out_row, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    columns = tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    rest = pid % (GROUP * columns)
    m0 = (first + rest % size) * BLOCK_M
    n0 = rest // size * BLOCK_N
    steps = tl.cdiv(K, 128)
    m = m0 + tl.arange(0, BLOCK_M)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    scale_at = x_scale + m
    weight_at = w_scale + n0 // 128 * steps
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One step ahead: a load of one value is not put in flight by itself.
    t = tl.load(weight_at)
    for step in tl.range(0, steps, num_stages=STAGES):
        a = x_box.load([m0, step * 128])
        b = w_box.load([n0, step * 128])
        s = tl.load(scale_at + step * scale_row, mask=m < M, other=0.0)
        coming = tl.load(weight_at + tl.minimum(step + 1, steps - 1))
        acc += tl.dot(a, tl.trans(b), max_num_imprecise_acc=128) * (s * t)[:, None]
        t = coming
    start_next(PDL, LOADED)
    n = n0 + tl.arange(0, BLOCK_N)
    at = out + (m.to(tl.int64) * out_row)[:, None] + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def fp8_gemm(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    *,
    tile: GemmTile | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """q E4M3 [T, K] with scale float32 [⌈K / 128⌉, T] (`fp8_quantise.quantise_rows`) · weight E4M3 [N, K]ᵀ with w_scale float32
    [⌈N / 128⌉, ⌈K / 128⌉] → [T, N]. K a multiple of 16, operands contiguous. Reference:
    `kernels.block_fp8.linear_reference`."""
    tokens, depth = q.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=out_dtype, device=q.device)
    if not tokens:
        return out
    if not (bulk_copies(q) and bulk_copies(weight)):
        raise ValueError(f"operands of {depth} columns cannot be read by TMA: a multiple of 16 is expected")
    tile = tile or GemmTile()
    limits = {} if tile.registers is None else {"maxnreg": tile.registers}
    launch(
        _fp8_gemm_kernel, (-(-tokens // tile.rows) * -(-rows // tile.columns),), out, descriptor(q, tile.rows, 128), scale,
        descriptor(weight, tile.columns, 128), w_scale, tokens, rows, depth, scale.stride(0), out.stride(0),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, GROUP=tile.group, STAGES=tile.stages, num_warps=tile.warps,
        num_stages=tile.stages, **limits, **programmatic(q.device, "product"),
    )  # fmt: skip
    return out
