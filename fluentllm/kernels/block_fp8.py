"""Block FP8, plainly: E4M3 values, one scale for 1 × 128 activations and for 128 × 128 weights; what the kernels are compared
with.

The format of DeepSeek's and LongCat's FP8 checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
LARGEST = 448.0
"""Of E4M3."""
LEAST_SCALE = 1e-12
E4M3 = torch.float8_e4m3fn


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] → E4M3 [T, K] and scale float32 [⌈K / 128⌉, T]: value = q · scale, the largest of each 128 becomes ±448."""
    tokens, depth = x.shape
    blocks = -(-depth // BLOCK)
    padded = torch.zeros(tokens, blocks * BLOCK, dtype=torch.float32, device=x.device)
    padded[:, :depth] = x
    groups = padded.view(tokens, blocks, BLOCK)
    scale = (groups.abs().amax(-1) / LARGEST).clamp_min(LEAST_SCALE)
    q = (groups / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(E4M3).flatten(1)[:, :depth]
    return q.contiguous(), scale.T.contiguous()


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] float → E4M3 [N, K] and scale float32 [⌈N / 128⌉, ⌈K / 128⌉]."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK, dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    tiles = padded.view(down, BLOCK, across, BLOCK)
    scale = (tiles.abs().amax((1, 3)) / LARGEST).clamp_min(LEAST_SCALE)
    q = (tiles / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(E4M3).view(padded.shape)
    return q[:rows, :columns].contiguous(), scale


def dequantise_rows(q: Tensor, scale: Tensor) -> Tensor:
    """q [T, K], scale [⌈K / 128⌉, T] → float32 [T, K]."""
    return q.float() * scale.T.repeat_interleave(BLOCK, 1)[:, : q.shape[1]]


def dequantise_weight(q: Tensor, scale: Tensor) -> Tensor:
    """q [N, K], scale [⌈N / 128⌉, ⌈K / 128⌉] → float32 [N, K]."""
    wide = scale.repeat_interleave(BLOCK, 1)[:, : q.shape[1]]
    return q.float() * wide.repeat_interleave(BLOCK, 0)[: q.shape[0]]


def linear_reference(q: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    """The product of the dequantised operands, float32 [T, N]."""
    return dequantise_rows(q, scale) @ dequantise_weight(weight, w_scale).T
