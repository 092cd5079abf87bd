"""Products whose rows keep their bits whatever other rows there are (deterministic mode): tiles chosen by the matrix alone.

One matrix: `linear.linear` with a tile that does not depend on the number of rows, columns of the matrix never shared among
programs. Several at once (`fixed_bmm`): a kernel of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import dot
from .launch import launch
from .linear import linear
from .linear_tiles import LinearTile

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 64
"""Rows of x of a tile: few enough for decode, enough that prefill does not read the matrix too often."""
NARROW = 64 * 132
"""A matrix of fewer rows is cut finer, so that more of the chip has something to do."""


def fixed_tile(rows: int, width: int, *, gated: bool = False, scales: bool = False) -> LinearTile:
    """For a matrix of `rows` rows (twice as many if gated) of `width` bytes an element; `scales`: block FP8."""
    tile_rows = 32 if rows * (2 if gated else 1) < NARROW else 64
    depth = 32 if width == 4 else 64 if gated and not scales else 128
    return LinearTile(TOKENS, tile_rows, depth, 1, 4)


def fixed_linear(
    x: Tensor, weight: Tensor, *, other: Tensor | None = None, gated: bool = False, out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None, w_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`linear.linear`, any number of rows."""
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    tile = fixed_tile(rows, x.element_size(), gated=gated, scales=w_scale is not None)
    return linear(
        x, weight, other=other, gated=gated, tile=tile, out_dtype=out_dtype, x_scale=x_scale, w_scale=w_scale
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _fixed_bmm_kernel(out, a, b, T, a_batch, a_row, a_column, b_batch, b_row, b_column, out_batch, out_row, out_column,
                      N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_at = a + batch * a_batch + (m * a_row)[:, None]
    b_at = b + batch * b_batch + (n * b_column)[None, :]
    for base in range(0, K, BLOCK_K):
        deep = base + k < K
        x = tl.load(a_at + ((base + k) * a_column)[None, :], mask=(m < T)[:, None] & deep[None, :], other=0.0)
        y = tl.load(b_at + ((base + k) * b_row)[:, None], mask=(n < N)[None, :] & deep[:, None], other=0.0)
        acc = dot(x, y, acc)
    at = out + batch * out_batch + (m * out_row)[:, None] + (n * out_column)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < T)[:, None] & (n < N)[None, :])


def fixed_bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [B, T, K], b [B, K, N], any strides → [B, T, N], into `out` if given. Reference: `torch.bmm`."""
    count, tokens, depth = a.shape
    if out is None:
        out = a.new_empty(count, tokens, b.shape[2])
    block_k = 64 if a.element_size() <= 2 else 32
    launch(
        _fixed_bmm_kernel, (-(-tokens // 32), -(-b.shape[2] // 64), count), out, a, b, tokens, *a.stride(), *b.stride(),
        *out.stride(), N=b.shape[2], K=depth, BLOCK_M=32, BLOCK_N=64, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
