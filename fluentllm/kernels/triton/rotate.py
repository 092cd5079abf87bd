"""Norm and rotary of heads as the QKV product leaves them, and how a cache keeps them: for the kernels that write KV."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(x, dtype: tl.constexpr):
    """x float32 as a cache of this dtype keeps it: what FP8 cannot hold becomes its largest value (`kernels.kv_fp8.kept`)."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(dtype)


@triton.jit
def partner(d, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The place of each value's partner in its rotary pair; its own where nothing rotates."""
    if INTERLEAVED:
        other = d ^ 1
    else:
        other = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
    return tl.where(d < ROTARY, other, d)


@triton.jit
def head_weight(weight, d, DIM: tl.constexpr):
    """A norm's weight [1, BLOCK_D] float32 at places d of a head; None of none."""
    if weight is None:
        found = None
    else:
        found = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    return found


@triton.jit
def heads_and_partners(at, mask, d, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """at [R, 1]: heads' first values; mask [R, BLOCK_D] → (values at d, values at `partner`), as they lie there."""
    x = tl.load(at + d[None, :], mask=mask, other=0.0)
    return x, tl.load(at + partner(d, ROTARY, INTERLEAVED)[None, :], mask=mask, other=0.0)


@triton.jit
def rotary_factors(cos, sin, mask, d, ROTARY: tl.constexpr):
    """cos, sin [R, 1]: the rows' first values → what a head's values and their partners are multiplied by, [R, BLOCK_D]
    float32."""
    rotates = mask & (d < ROTARY)[None, :]
    c = tl.load(cos + d[None, :], mask=rotates, other=1.0).to(tl.float32)
    s = tl.load(sin + d[None, :], mask=rotates, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def normed_and_rotated(x, p, weight, partner_weight, c, s, eps, DIM: tl.constexpr):
    """x, p: of `heads_and_partners`; weights: `head_weight`s at d and at `partner`, or None; c, s: of `rotary_factors`
    → [R, BLOCK_D] in x's dtype."""
    y = x.to(tl.float32)
    p = p.to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(y * y, 1) / DIM + eps)[:, None]
        # The norm's result has the activations' dtype wherever it is computed.
        y = (y * scale * weight).to(x.dtype).to(tl.float32)
        p = (p * scale * partner_weight).to(x.dtype).to(tl.float32)
    return (y * c + p * s).to(x.dtype)


@triton.jit
def norm_and_rotate(at, mask, weight, partner_weight, cos, sin, d, eps, DIM: tl.constexpr, ROTARY: tl.constexpr,
                    INTERLEAVED: tl.constexpr):  # fmt: skip
    """All three → (rotated, as it came)."""
    x, p = heads_and_partners(at, mask, d, ROTARY, INTERLEAVED)
    c, s = rotary_factors(cos, sin, mask, d, ROTARY)
    return normed_and_rotated(x, p, weight, partner_weight, c, s, eps, DIM), x
