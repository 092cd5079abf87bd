"""y = x Wᵀ for one or two tokens: a program asks for all its weights while the kernels in front still run, holds them in
registers, and multiplies when x is there.

At so few tokens a step is a chain of small kernels, and what each adds to it is the time from its predecessor's end to its own.
Here that is one read of x from L2, a few multiplications and a store: the weights are on the chip by then, nobody waits for
partial sums of others, and tensor cores would only ask for another arrangement of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, SCALE_BLOCK, silu_of_rounded, start_next, wait_for_inputs
from .launch import HOPPER_MULTIPROCESSORS, launch, power_of_2, programmatic

if TYPE_CHECKING:
    from .row_product import RowProduct

MOST_TOKENS = 2
"""More rows are `linear`'s own kernel's: at four a step takes 1 to 6 % longer this way (one H100, Qwen3-0.6B and
DeepSeek-V3-Lite). 0: all are."""
HELD_BYTES = 128
"""Of weights a thread at most, if that gives every multiprocessor a program: 32 registers."""


def vector(width: int) -> int:
    """Columns of `width` bytes that a thread reads at once: 16 bytes, of float32 32."""
    return 16 if width == 1 else 8


@dataclass(frozen=True, slots=True)
class HeldTile:
    """Sizes of `held_product`."""

    rows: int
    """Rows of the matrix of a program (twice as many when gated), a power of two."""
    depth: int
    """Columns of a piece, a power of two, at least 16; a program holds all pieces of its rows."""
    warps: int = 4


def held_tile(tokens: int, rows: int, depth: int, gated: bool, width: int = 2) -> HeldTile | None:
    """For x [tokens, depth] and a matrix [rows, depth] (twice the rows if gated) of one or two bytes an element; None: too
    many tokens, or rows too long to be held."""
    if not 0 < tokens <= MOST_TOKENS or depth > 16384:
        return None
    parts = 2 if gated else 1
    piece = min(1024, max(16, power_of_2(depth)))
    # Small pieces are spread over fewer threads than there are, and many take seconds to compile.
    while piece > 256 and -depth % piece > depth // 8:
        piece //= 2
    warps = 4 if depth * parts * width <= 8192 else 8
    held = max(1, 32 * warps * HELD_BYTES // (depth * parts * width))
    while held > 1 and -(-rows // held) < HOPPER_MULTIPROCESSORS:
        held //= 2
    return HeldTile(power_of_2(held + 1) // 2, piece, warps)


@triton.jit
def _add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def held_pieces(w, n, N, K, w_row, DEPTH: tl.constexpr, PIECES: tl.constexpr, VECTOR: tl.constexpr):
    """W[n, …] in pieces [ROWS, DEPTH / VECTOR, VECTOR]."""
    held = ()
    for i in tl.static_range(PIECES):
        k = i * DEPTH + tl.arange(0, DEPTH // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        at = w + (n.to(tl.int64) * w_row)[:, None, None] + k[None, :, :]
        tile = tl.load(at, mask=(n < N)[:, None, None] & (k < K)[None, :, :], other=0.0, eviction_policy="evict_first")
        held = held + (tile,)
    return held


@triton.jit
def held_scales(scale, n, N, K, DEPTH: tl.constexpr, PIECES: tl.constexpr, VECTOR: tl.constexpr):
    """Their scales in block FP8, of scale [⌈N / 128⌉, ⌈K / 128⌉]: [ROWS, DEPTH / VECTOR] each."""
    scales = ()
    for i in tl.static_range(PIECES):
        k = i * DEPTH + tl.arange(0, DEPTH // VECTOR) * VECTOR
        at = scale + (n // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK))[:, None] + (k // SCALE_BLOCK)[None, :]
        scales = scales + (tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0),)
    return scales


@triton.jit
def held_row(x, m, M, K, x_row, DEPTH: tl.constexpr, PIECES: tl.constexpr, VECTOR: tl.constexpr):
    """Row m of x, of M, in pieces [DEPTH / VECTOR, VECTOR]; m int64."""
    read = ()
    end = tl.where(m < M, K, 0)
    for i in tl.static_range(PIECES):
        k = i * DEPTH + tl.arange(0, DEPTH // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        read = read + (tl.load(x + m * x_row + k, mask=k < end, other=0.0),)
    return read


@triton.jit
def _piece(held, scales, row, i: tl.constexpr):
    """One piece's part of `held_partial`."""
    acc = tl.sum(held[i].to(tl.float32) * row[i].to(tl.float32)[None, :, :], 2)
    return acc if scales is None else acc * scales[i]


@triton.jit
def held_partial(held, scales, row, PIECES: tl.constexpr):
    """Σ over the pieces and over a thread's own columns: [ROWS, DEPTH / VECTOR] float32. scales: of E4M3, else None."""
    acc = _piece(held, scales, row, 0)
    for i in tl.static_range(1, PIECES):
        acc += _piece(held, scales, row, i)
    return acc


@triton.jit
def _sums(held, scales, rows, PIECES: tl.constexpr, TOKENS: tl.constexpr):
    """W x[t] for each of one or two tokens: TOKENS sums [ROWS], reduced together, so that warps meet once."""
    if TOKENS == 1:
        sums = (tl.sum(held_partial(held, scales, rows[0], PIECES), 1),)
    else:
        first = held_partial(held, scales, rows[0], PIECES)
        sums = tl.reduce((first, held_partial(held, scales, rows[1], PIECES)), 1, _add_2)
    return sums


@triton.jit(do_not_specialize=["M", "factor", "parts", "eps", "normed"])
def _held_kernel(out, x, w, w_scale, other, residual, norm, squares, squares_out, M, N, K, x_row, w_row, out_row, other_row,
                 residual_row, factor, parts, eps, normed, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
                 PIECES: tl.constexpr, VECTOR: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """GATED: W holds N gate rows, then N up rows. w_scale: of E4M3 weights; x is not quantised."""
    start_next(PDL, FIRST)
    programs = tl.cdiv(N, ROWS)
    pid = tl.program_id(0)
    n = pid % programs * ROWS + tl.arange(0, ROWS)
    first = pid // programs * TOKENS
    held = held_pieces(w, n, N, K, w_row, DEPTH, PIECES, VECTOR)
    scales, scales_up = None, None
    if w_scale is not None:
        scales = held_scales(w_scale, n, N, K, DEPTH, PIECES, VECTOR)
    if GATED:
        held_up = held_pieces(w, n + N, 2 * N, K, w_row, DEPTH, PIECES, VECTOR)
        if w_scale is not None:
            scales_up = held_scales(w_scale, n + N, 2 * N, K, DEPTH, PIECES, VECTOR)
    if norm is not None:
        weight = tl.load(norm + n, mask=n < normed, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    rows, rests, befores, founds = (), (), (), ()
    for t in tl.static_range(TOKENS):
        m = (first + t).to(tl.int64)
        there = n < tl.where(m < M, N, 0)
        rows = rows + (held_row(x, m, M, K, x_row, DEPTH, PIECES, VECTOR),)
        if other is not None:
            rests = rests + (tl.load(other + m * other_row + n, mask=there, other=0.0),)
        if residual is not None:
            befores = befores + (tl.load(residual + m * residual_row + n, mask=there, other=0.0),)
        if PARTS > 0:
            part = tl.arange(0, PARTS)
            founds = founds + (tl.load(squares + part * M + m, mask=part < tl.where(m < M, parts, 0), other=0.0),)
    start_next(PDL, LOADED)
    sums = _sums(held, scales, rows, PIECES, TOKENS)
    if GATED:
        ups = _sums(held_up, scales_up, rows, PIECES, TOKENS)
    for t in tl.static_range(TOKENS):
        m = (first + t).to(tl.int64)
        there = n < tl.where(m < M, N, 0)
        acc = sums[t]
        scale = 1.0
        if PARTS > 0:
            scale = tl.rsqrt(tl.sum(founds[t], 0) / K + eps)
            acc = acc * scale
        if GATED:
            acc = silu_of_rounded(acc, ups[t] * scale, out.dtype.element_ty)
        if other is not None:
            acc = (acc.to(out.dtype.element_ty).to(tl.float32) + rests[t].to(tl.float32)) * factor
        y = acc.to(out.dtype.element_ty)
        if residual is not None:
            # The sum has the stream's dtype, as an addition of its own would leave it.
            y = (y.to(tl.float32) + befores[t].to(tl.float32)).to(out.dtype.element_ty)
            tl.store(residual + m * residual_row + n, y, mask=there)
        if norm is not None:
            wide = tl.where(there & (n < normed), y.to(tl.float32), 0.0)
            if (pid % programs * ROWS < normed) & (m < M):
                tl.store(squares_out + (pid % programs).to(tl.int64) * M + m, tl.sum(wide * wide, 0))
            y = tl.where(n < normed, (wide * weight).to(out.dtype.element_ty), y)
        tl.store(out + m * out_row + n, y, mask=there)


def held_product(product: RowProduct, tile: HeldTile) -> None:
    """One of three ways of `linear`. A weight in E4M3, with its scales, is multiplied by x as it is: there is time to spare,
    and nothing to quantise."""
    p = product
    block = 2 if p.tokens > 1 else 1
    launch(
        _held_kernel, (-(-p.rows // tile.rows) * -(-p.tokens // block),),
        p.out, p.x, p.weight, p.w_scale, p.other, p.residual, p.norm, p.squares, p.squares_out, p.tokens, p.rows, p.depth,
        p.x.stride(0), p.weight.stride(0), p.out.stride(0), p.other_row, p.residual_row, p.factor, p.parts, p.eps, p.normed,
        TOKENS=block, ROWS=tile.rows, DEPTH=tile.depth, PIECES=-(-p.depth // tile.depth),
        VECTOR=vector(p.weight.element_size()), GATED=p.gated, PARTS=p.padded_parts, num_warps=tile.warps,
        **programmatic(p.x.device, "product"),
    )  # fmt: skip
