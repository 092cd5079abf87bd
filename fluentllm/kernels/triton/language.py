"""What several kernels share on the device side."""

from __future__ import annotations

import triton
import triton.language as tl

UPCAST: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies bfloat16 matrices wrongly; there, and only there, operands are taken to float32."""


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
