"""A matrix in block FP8, plainly: activations are quantised by rows as the FP8 products of a GPU do it, then all is float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .block_fp8 import BLOCK, dequantise_weight, linear_reference, quantise_rows_reference, quantise_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Fp8BlockWeight:
    """E4M3 values with one float32 scale for each 128 × 128 of them; x gets one for each 1 × 128."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        """q E4M3 [out, in], scale float32 [⌈out / 128⌉, ⌈in / 128⌉]."""
        self.q, self.scale = q, scale
        self.out_features, self.in_features = q.shape
        self.nbytes = q.nbytes + scale.nbytes

    @classmethod
    def of(cls, weight: Tensor) -> Fp8BlockWeight:
        """weight [out, in], float, quantised here."""
        return cls(*quantise_weight(weight))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out] in x's dtype."""
        y = linear_reference(*quantise_rows_reference(x), self.q, self.scale).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        return dequantise_weight(self.q, self.scale)


def side_by_side(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """(q, scale) of matrices one below the other; None where a block would hold rows of two: every part but the last must have
    a multiple of 128 rows."""
    if any(q.shape[0] % BLOCK for q, _ in parts[:-1]):
        return None
    if len(parts) == 1:
        return parts[0]
    # Concatenated as bytes: not every device knows E4M3 well enough.
    bytes_ = torch.cat([q.view(torch.uint8) for q, _ in parts])
    return bytes_.view(parts[0][0].dtype), torch.cat([scale for _, scale in parts])


def fp8_products(device: torch.device) -> bool:
    """Does this device multiply block FP8 in its matrix units, with our kernels? From Hopper on (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def on_hopper(device: torch.device) -> bool:
    """Is it a GPU of compute capability 9.x, for which some of these products are made?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
