"""y = x Wᵀ for few rows of x: the weights pass through the chip once, as fast as memory gives them (`streaming.stream`).

One or two tokens go another way (`held.py`), and on Hopper most others up to 16 in BF16 and 64 in FP8 (`linear_hopper.py`).
Where W has too few rows to fill the chip, several programs share a tile's columns, and the last to finish adds up what all
found, in their order. With programmatic dependent launch a program asks for its first weights while the kernels before it run.

Both ends of an RMS norm can be its: what it leaves at the end of one product, and what it applies in the next (`normed.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .held import HeldTile, held_product
from .language import FIRST, LOADED, silu_of_rounded, start_next, wait_for_inputs
from .launch import bulk_copies, descriptor, launch, power_of_2, programmatic
from .linear_hopper import HopperTile, hopper_product, takes
from .linear_tiles import LinearTile, Tile, linear_tile, streamed_tile
from .normed import Normed, load_squares, norm_factor, opened
from .streaming import prefetch_weights, stream

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import NormAfter


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


def new_counters(rows: int, device: torch.device) -> Tensor:
    """What `linear` counts finished programs in, for one matrix of `rows` rows: zeros between calls. Calls that may run at the
    same time must not share it."""
    return torch.zeros(4 * -(-rows // 16), dtype=torch.int32, device=device)


def linear(
    x: Tensor | Normed,
    weight: Tensor,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    gated: bool = False,
    other: Tensor | None = None,
    factor: float = 1.0,
    counters: Tensor | None = None,
    tile: Tile | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]; x's last dimension contiguous.

    BF16 (float16, float32 too); or both E4M3 with x_scale float32 [⌈K / 128⌉, T] (`fp8_quantise.quantise_rows`) and w_scale
    float32 [⌈N / 128⌉, ⌈K / 128⌉] → `out_dtype`, BF16 unless given; or x in BF16 and the weight in E4M3 with w_scale, where
    `holds` says so.
    gated: weight holds gate rows, then as many up rows (with scales a multiple of 128) → silu(gate) · up, [T, N / 2].
    other [T, N], or [N] for all rows → (product + other) · factor.
    counters: `new_counters` of this matrix; without them columns are not split.
    Reference: `F.linear`; with scales `kernels.block_fp8.linear_reference`.
    """
    out, _ = _product(
        x, weight, None, x_scale=x_scale, w_scale=w_scale, gated=gated, other=other, factor=factor, counters=counters,
        tile=tile, out_dtype=out_dtype,
    )  # fmt: skip
    return out


def linear_norm(
    x: Tensor | Normed,
    weight: Tensor,
    after: NormAfter,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    other: Tensor | None = None,
    counters: Tensor | None = None,
    tile: Tile | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Normed, Tensor]:
    """As `linear`, then `after` → the first columns [T, D], normed but for their factor, and the whole product [T, N], whose
    first columns are these. Reference: `PlainOps.add_rms_norm`, `PlainOps.rms_norm`."""
    out, squares = _product(
        x, weight, after, x_scale=x_scale, w_scale=w_scale, other=other, counters=counters, tile=tile, out_dtype=out_dtype
    )
    assert squares is not None
    return Normed(out[:, : after.weight.shape[0]], squares, after.eps), out


def holds(tokens: int, rows: int, depth: int, gated: bool) -> bool:
    """Is x [tokens, depth] multiplied by an E4M3 matrix [rows, depth] (gated: twice the rows) as it is, not quantised?"""
    return isinstance(linear_tile(tokens, rows, depth, 1, gated), HeldTile)


def takes_norm(tokens: int, rows: int, depth: int, width: int, normed: int, device: torch.device) -> bool:
    """Can `linear_norm` norm the first `normed` columns? No tile may hold columns of both kinds."""
    tile = linear_tile(tokens, rows, depth, width, False, device)
    return normed == rows or isinstance(tile, HeldTile) or normed % tile.rows == 0


def _product(
    x: Tensor | Normed,
    weight: Tensor,
    after: NormAfter | None,
    *,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    other: Tensor | None,
    counters: Tensor | None,
    tile: Tile | None,
    out_dtype: torch.dtype | None,
    gated: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """→ the product, and Σ x² of the columns that `after` norms, by tiles."""
    x, before, parts, eps = opened(x)
    tokens, depth = x.shape
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(tokens, rows, dtype=out_dtype or (x.dtype if x_scale is None else torch.bfloat16), device=x.device)
    if tile is None:
        choose = linear_tile if x_scale is None else streamed_tile
        device = x.device if counters is not None and takes(x, weight) else None
        tile = choose(tokens, rows, depth, weight.element_size(), gated, device)
    squares = residual = norm = None
    if after is not None:
        residual, norm = after.residual, after.weight
        squares = torch.empty(-(-norm.shape[0] // tile.rows), tokens, dtype=torch.float32, device=x.device)
    if isinstance(tile, HeldTile):
        held_product(
            x, weight, out, tile, w_scale=w_scale, squares=before, eps=eps, gated=gated, other=other, factor=factor,
            residual=residual, norm=norm, squares_out=squares,
        )  # fmt: skip
        return out, squares
    if tokens and (x_scale is None) != (w_scale is None):
        raise ValueError(f"{tokens} rows by an E4M3 matrix must be quantised: x_scale is missing (`holds` tells)")
    normed = 0 if norm is None else norm.shape[0]
    if normed not in (0, rows) and (normed % tile.rows or residual is not None):
        raise ValueError(f"{normed} normed columns of {rows} do not fit tiles of {tile.rows}")
    if isinstance(tile, HopperTile):
        if not takes(x, weight):
            raise ValueError("operands that TMA cannot read: their rows must be aligned to 16 bytes")
        hopper_product(
            x, weight, out, tile, counters, x_scale=x_scale, w_scale=w_scale, squares=before, eps=eps, gated=gated, other=other,
            factor=factor, residual=residual, norm=norm, squares_out=squares,
        )  # fmt: skip
        return out, squares
    pdl = programmatic(x.device, "product")
    splits = tile.splits if counters is not None and not gated else 1
    columns, m_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
    if splits > 1 and counters is not None and columns * m_tiles > counters.shape[0]:
        splits = 1
    steps = -(-depth // (tile.depth * splits))
    partial = None
    if splits > 1:
        partial = torch.empty(columns * m_tiles * splits * tile.rows * tile.tokens, dtype=torch.float32, device=x.device)
    box = descriptor(weight, tile.rows, tile.depth) if tile.tma and bulk_copies(weight) else None
    launch(
        _linear_kernel, (columns * splits * m_tiles,), out, x, x_scale, weight, box, w_scale, other, residual,
        norm, before, squares, partial,
        counters if splits > 1 else None, tokens, rows, depth, x.stride(0), weight.stride(0),
        0 if x_scale is None else x_scale.stride(0), out.stride(0),
        0 if other is None or other.ndim == 1 else other.stride(0), 0 if residual is None else residual.stride(0),
        factor, steps, parts, eps, normed,
        BLOCK_M=tile.tokens, BLOCK_N=tile.rows, BLOCK_K=tile.depth, SPLITS=splits, GATED=gated, STAGES=tile.stages,
        CHUNKS=tile.prefetch if tile.prefetch and pdl["PDL"] and bulk_copies(weight) else 0, WIDTH=x.element_size(),
        PARTS=power_of_2(parts) if parts else 0,
        num_warps=tile.warps, num_stages=tile.stages, **pdl,
    )  # fmt: skip
    return out, squares


__all__ = ["LinearTile", "holds", "linear", "linear_norm", "new_counters", "takes_norm"]
