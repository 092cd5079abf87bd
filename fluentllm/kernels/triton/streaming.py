"""The inner loop that products of few rows share: a tile of weights, streamed from memory, times a tile of tokens.

Operands are swapped: the tile of W's rows is the M of the matrix instruction, and the tokens, of which there are few, its N,
which may be as small as 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import SCALE_BLOCK, dot, prefetch_l2

PREFETCH_BYTES: tl.constexpr = tl.constexpr(256)
"""Of one row, by one instruction."""


@triton.jit
def load_weights(w, w_box, r0, r, rows, base, K, w_row, BLOCK_K: tl.constexpr):
    """W[r0 …, base …] as [BLOCK_N, BLOCK_K]; `w_box`: its TMA descriptor or None; r: the rows' numbers, of which there are
    `rows`."""
    if w_box is not None:
        return w_box.load([r0, base])
    k = base + tl.arange(0, BLOCK_K)
    at = w + (r.to(tl.int64) * w_row)[:, None] + k[None, :]
    return tl.load(at, mask=(r < rows)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def stream(x, x_scale, w, w_box, w_scale, row, valid, r0, rows, gap, K, x_row, w_row, scale_row, first, last,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """Σ over steps first … last - 1 of W[r0 + …, step] x[row, step]ᵀ → two sums [BLOCK_N, BLOCK_M] float32, the second (for
    GATED) of the rows that lie `gap` rows further down, in the same pass.

    row, valid [BLOCK_M]: rows of x; rows: end of W's. BF16, or with scales E4M3: x_scale [⌈K / 128⌉, scale_row], w_scale
    [⌈rows / 128⌉, ⌈K / 128⌉], float32, and BLOCK_K 128, so that a step's sum has one scale a token and one a row: it is
    promoted to float32 at every step.
    """
    k = tl.arange(0, BLOCK_K)
    r = r0 + tl.arange(0, BLOCK_N)
    x_at = x + (row * x_row)[:, None] + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        base = step * BLOCK_K
        a = load_weights(w, w_box, r0, r, rows, base, K, w_row, BLOCK_K)
        b = tl.load(x_at + base, mask=valid[:, None] & (base + k < K)[None, :], other=0.0)
        if x_scale is None:
            acc = dot(a, tl.trans(b), acc)
        else:
            s = tl.load(x_scale + step * scale_row + row, mask=valid, other=0.0)
            t = tl.load(w_scale + r // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + step, mask=r < rows, other=0.0)
            acc += dot(a, tl.trans(b), zero) * (t[:, None] * s[None, :])
        if GATED:
            a = load_weights(w, w_box, r0 + gap, r + gap, rows + gap, base, K, w_row, BLOCK_K)
            if x_scale is None:
                up = dot(a, tl.trans(b), up)
            else:
                t = tl.load(w_scale + (r + gap) // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + step, mask=r < rows, other=0.0)
                up += dot(a, tl.trans(b), zero) * (t[:, None] * s[None, :])
    return acc, up


@triton.jit
def prefetch_weights(w, r0, rows, gap, K, w_row, first, last, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     GATED: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Ask for the first CHUNKS · 256 bytes of each row that `stream` will read; WIDTH: bytes of an element."""
    r = r0 + tl.arange(0, BLOCK_N)
    k = first * BLOCK_K + tl.arange(0, CHUNKS) * (PREFETCH_BYTES // WIDTH)
    there = (r < rows)[:, None] & (k + PREFETCH_BYTES // WIDTH <= tl.minimum(K, last * BLOCK_K))[None, :]
    at = w + (r.to(tl.int64) * w_row)[:, None] + k[None, :]
    prefetch_l2(at, there, PREFETCH_BYTES)
    if GATED:
        prefetch_l2(at + gap.to(tl.int64) * w_row, there, PREFETCH_BYTES)
