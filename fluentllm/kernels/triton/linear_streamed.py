"""y = x Wᵀ for few rows of x: the weights pass through the chip once, as fast as memory gives them (`streaming.stream`).

Where W has too few rows to fill the chip, several programs share a tile's columns, and the last to finish adds up what all
found, in their order. With programmatic dependent launch a program asks for its first weights while the kernels before it run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, silu_of_rounded, start_next, wait_for_inputs
from .launch import bulk_copies, descriptor, launch, programmatic
from .normed import load_squares, norm_factor
from .streaming import prefetch_weights, stream

if TYPE_CHECKING:
    from .linear_tiles import LinearTile
    from .row_product import RowProduct


@triton.jit
def _finish(out, other, residual, norm, squares_out, acc, m, n0, M, N, normed, out_row, other_row, residual_row, factor,
            BLOCK_N: tl.constexpr):  # fmt: skip
    n = n0 + tl.arange(0, BLOCK_N)
    inside = (m < M)[None, :] & (n < N)[:, None]
    row = m.to(tl.int64)
    if other is not None:
        rest = tl.load(other + (row * other_row)[None, :] + n[:, None], mask=inside, other=0.0)
        acc = (acc.to(out.dtype.element_ty).to(tl.float32) + rest.to(tl.float32)) * factor
    y = acc.to(out.dtype.element_ty)
    if residual is not None:
        at = residual + (row * residual_row)[None, :] + n[:, None]
        # The sum has the stream's dtype, as an addition of its own would leave it.
        y = (y.to(tl.float32) + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(at, y, mask=inside)
    if norm is not None:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
        if n0 < normed:
            wide = tl.where(inside, y.to(tl.float32), 0.0)
            tl.store(squares_out + (n0 // BLOCK_N).to(tl.int64) * M + m, tl.sum(wide * wide, 0), mask=m < M)
            weight = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
            y = (wide * weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * out_row)[None, :] + n[:, None], y, mask=inside)


@triton.jit(do_not_specialize=["M", "steps", "scale_row", "factor", "parts", "eps", "normed"])
def _linear_kernel(out, x, x_scale, w, w_box, w_scale, other, residual, norm, squares, squares_out, partial, counters, M, N, K,
                   x_row, w_row, scale_row, out_row, other_row, residual_row, factor, steps, parts, eps, normed,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                   GATED: tl.constexpr, STAGES: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """GATED: W holds N gate rows, then N up rows."""
    columns = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % columns * BLOCK_N
    split = pid // columns % SPLITS
    m = pid // (columns * SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    start_next(PDL, FIRST)
    if CHUNKS > 0:
        prefetch_weights(w, n0, N, N, K, w_row, first, last, BLOCK_N, BLOCK_K, GATED, CHUNKS, WIDTH)
    wait_for_inputs(PDL)
    if PARTS > 0:
        found = load_squares(squares, m, M, parts, PARTS)
    acc, up = stream(x, x_scale, w, w_box, w_scale, m.to(tl.int64), m < M, n0, N, N, K, x_row, w_row, scale_row, first, last,
                     BLOCK_M, BLOCK_N, BLOCK_K, GATED, STAGES)  # fmt: skip
    start_next(PDL, LOADED)
    if PARTS > 0:
        scale = norm_factor(found, K, eps)[None, :]
        acc = acc * scale
        up = up * scale
    if GATED:
        acc = silu_of_rounded(acc, up, out.dtype.element_ty)
    if SPLITS == 1:
        _finish(out, other, residual, norm, squares_out, acc, m, n0, M, N, normed, out_row, other_row, residual_row, factor,
                BLOCK_N)  # fmt: skip
    else:
        tile = pid // (columns * SPLITS) * columns + pid % columns
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        sums = partial + tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M) + place
        tl.store(sums + split * (BLOCK_N * BLOCK_M), acc)
        # All threads' sums are written before the one that counts says so.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(sums + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(counters + tile, 0)
            _finish(out, other, residual, norm, squares_out, acc, m, n0, M, N, normed, out_row, other_row, residual_row, factor,
                    BLOCK_N)  # fmt: skip


def streamed_product(product: RowProduct, tile: LinearTile) -> None:
    """One of three ways of `linear`. Without counters columns are not split."""
    p = product
    pdl = programmatic(p.x.device, "product")
    columns, m_tiles = -(-p.rows // tile.rows), -(-p.tokens // tile.tokens)
    counted = p.counters is not None and not p.gated and columns * m_tiles <= p.counters.shape[0]
    splits = tile.splits if counted else 1
    steps = -(-p.depth // (tile.depth * splits))
    partial = None
    if splits > 1:
        sums = columns * m_tiles * splits * tile.rows * tile.tokens
        partial = torch.empty(sums, dtype=torch.float32, device=p.x.device)
    box = descriptor(p.weight, tile.rows, tile.depth) if tile.tma and bulk_copies(p.weight) else None
    launch(
        _linear_kernel, (columns * splits * m_tiles,), p.out, p.x, p.x_scale, p.weight, box, p.w_scale, p.other, p.residual,
        p.norm, p.squares, p.squares_out, partial, p.counters if splits > 1 else None, p.tokens, p.rows, p.depth,
        p.x.stride(0), p.weight.stride(0), p.scale_row, p.out.stride(0), p.other_row, p.residual_row, p.factor, steps,
        p.parts, p.eps, p.normed,
        BLOCK_M=tile.tokens, BLOCK_N=tile.rows, BLOCK_K=tile.depth, SPLITS=splits, GATED=p.gated, STAGES=tile.stages,
        CHUNKS=tile.prefetch if tile.prefetch and pdl["PDL"] and bulk_copies(p.weight) else 0, WIDTH=p.x.element_size(),
        PARTS=p.padded_parts, num_warps=tile.warps, num_stages=tile.stages, **pdl,
    )  # fmt: skip
