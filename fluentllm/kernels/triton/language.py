"""What several kernels share on the device side."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..block_fp8 import BLOCK

UPCAST: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies bfloat16 matrices wrongly; there, and only there, operands are taken to float32."""

SCALE_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
"""Columns that share a scale in block FP8 (activations 1 × 128, weights 128 × 128)."""
FIRST: tl.constexpr = tl.constexpr(1)
"""Place of `start_next`: before anything else."""
LOADED: tl.constexpr = tl.constexpr(2)
"""Place of `start_next`: when all that the program reads is there or on its way: behind the main loop, before the reductions
and stores at the end."""


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in float32; float32 operands are not rounded to TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def silu(x):
    """x · sigmoid(x), x float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_of_rounded(gate, up, dtype: tl.constexpr):
    """silu(gate) · up of float32 sums, rounded first, as a product of its own would leave them."""
    return silu(gate.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)


@triton.jit
def start_next(PDL: tl.constexpr, WHERE: tl.constexpr):
    """Programmatic dependent launch: the next kernel may be set up from here on, if WHERE is the place that PDL
    names. It still waits for all of this one's writes."""
    if PDL == WHERE:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Programmatic dependent launch: what the kernels before wrote is there after this; nothing may be written before it."""
    if PDL > 0:
        gdc_wait()


@triton.jit
def prefetch_l2(pointers, mask, BYTES: tl.constexpr):
    """Ask for BYTES (a multiple of 16) behind each pointer (aligned to 16) to be in L2 soon. Not in the interpreter."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [pointers, mask.to(tl.int32), BYTES],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def scatter(pointers, values, mask):
    """`tl.store` of 32-bit values to places all over memory, by the threads that hold them: a store whose addresses do not
    follow each other is given a layout of its own, and getting there takes longer than the store."""
    if UPCAST:
        tl.store(pointers, values, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [pointers, values, mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def merge_runs(acc, total, top, lse, values):
    """Some more runs of keys that were attended to apart: acc [D], total and top of those before; lse [R] in log2 units, -inf
    for a run without a visible key; values [R, D], normalised. Start with a finite top, so that no difference is NaN."""
    higher = tl.maximum(top, tl.max(lse, 0))
    fade = tl.exp2(top - higher)
    weight = tl.exp2(lse - higher)
    return acc * fade + tl.sum(weight[:, None] * values, 0), total * fade + tl.sum(weight, 0), higher
