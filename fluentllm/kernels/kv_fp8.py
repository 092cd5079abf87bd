"""Keys and values of grouped heads in FP8: E4M3 with a scale of 1, in plain torch; `triton/kv_append.py` writes the same.

Why 1 and nothing finer: E4M3 has an exponent of its own, so a scale moves its range (2⁻⁶ to 448, and 2⁻⁹ in coarser steps)
and gains no precision inside it. A static scale must come from a checkpoint or a calibration, which the models here do not
ship; one that is measured while serving would make a token's KV depend on what was served before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of this dtype keeps it. What FP8 cannot hold becomes its largest value, not NaN."""
    if dtype is torch.float8_e4m3fn:
        x = x.clamp(-E4M3_MAX, E4M3_MAX)
    return x.to(dtype)


def write_rows(cache: Tensor, rows: Tensor, values: Tensor) -> None:
    """values [T, …] in the dtype of `cache` [R, …] to its rows `rows` [T] int64."""
    if cache.dtype is torch.float8_e4m3fn:  # for which torch has no index_copy_
        cache, values = cache.view(torch.uint8), values.view(torch.uint8)
    cache.index_copy_(0, rows, values)
