"""y = x Wᵀ in block FP8 by cuBLAS, through torch: the fastest way for many rows where there is one.

Scales of 1 × 128 and 128 × 128 are a Hopper feature of cuBLAS 12.9 and later, so PyTorch must have been built with CUDA 12.9 or
later. `kernels.triton.fp8_gemm` is what serves elsewhere.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8_weight import on_hopper

ROWS = 4
"""Rows of x, and blocks of columns that scales of W are laid out for, come in multiples of this."""


@cache
def library_products(device: torch.device) -> bool:
    """Does cuBLAS multiply block FP8 on this device?"""
    if not on_hopper(device) or torch.version.cuda is None or not hasattr(F, "scaled_mm"):
        return False
    return tuple(int(part) for part in torch.version.cuda.split(".")[:2]) >= (12, 9)


def library_scale(weight: Tensor, scale: Tensor) -> Tensor | None:
    """The scale of weight [N, K], float32 [⌈N / 128⌉, ⌈K / 128⌉], as cuBLAS reads it: with rows padded to a multiple of four.
    None where it cannot multiply by this weight: on other devices, or if N or K is no multiple of 16."""
    if not library_products(weight.device) or any(size % 16 for size in weight.shape):
        return None
    return F.pad(scale, (0, -scale.shape[1] % ROWS)).contiguous()


def library_product(q: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """q E4M3 [T, K] with scale float32 [⌈K / 128⌉, T], T a multiple of four · weight E4M3 [N, K]ᵀ with `w_scale` of
    `library_scale` → [T, N] in BF16 or float32. Reference: `block_fp8.linear_reference`."""
    rows, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(q, weight.t(), scale.t(), rows, w_scale.t(), blocks, output_dtype=out_dtype)
