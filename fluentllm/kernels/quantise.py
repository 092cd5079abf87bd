"""Rounding of float matrices to few bits, and back: what `weights` packs and what the tests compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .block_fp8 import dequantise_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

GROUP = 32
"""Values that share a scale in 4-bit weights, and in the blocks of Q4_1 and Q8_0."""


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → q int8 [out, in], scale float32 [out]: value = q · scale; the largest of each row becomes ±127."""
    # Rounded to bfloat16 first, because that is what the product multiplies with.
    scale = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16).float()
    q = (weight.float() / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return q, scale


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [out, in] → q uint8 [out, in] 0 … 15, scale and zero float32 [out, in / 32]: value = (q - 8) · scale + zero; each
    group spans its least and largest value."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-12).to(torch.bfloat16).float()
    zero = (low + 8 * scale).to(torch.bfloat16).float()
    q = ((groups - zero.unsqueeze(-1)) / scale.unsqueeze(-1) + 8).round_().clamp_(0, 15).to(torch.uint8)
    return q.flatten(1), scale, zero


def dequantise_blocks(kind: str, parts: Mapping[str, Tensor]) -> Tensor:
    """A checkpoint's blocks (`kind` and `parts` as in `core.protocols.PackedTensor`) → [rows, columns] float32."""
    if kind == "fp8_block":
        return dequantise_weight(parts["q"], parts["scale"])
    if kind not in ("q4_1", "q8_0"):
        raise ValueError(f"blocks of kind {kind!r} are unknown, 'q4_1', 'q8_0' or 'fp8_block' is expected")
    q, d = parts["q"], parts["d"].float().unsqueeze(-1)
    values = q.reshape(*d.shape[:2], -1).float().mul_(d)
    if kind == "q4_1":
        values += parts["m"].float().unsqueeze(-1)
    return values.view(q.shape)
