"""Products of int8 weights with activations of 16 bits, as two products of 8 bits: fastest for several rows where VNNI is.

Eight bits are too few for activations, whose largest values are far from the rest: SmolLM2 then keeps 94 % of its most likely
tokens. Sixteen are as good as floats, and both halves go through one product of twice the rows, while reading the weights is
what costs.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 32639
"""Of |activation / step|, so that both bytes stay in range."""
_CENTRE = 32768 + 128
"""Added before the split: high and low byte then both have the zero point 128."""


@cache
def has_vnni() -> bool:
    """oneDNN computes bytes exactly and fast here; without VNNI sums of two products may saturate."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    known = capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")
    return bool(known) and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


class SplitInt8Weight:
    """value = q · scale, one scale a row. Activations are rounded to 16 bits, one step a row of them."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        """q int8 [out, in], scale [out]."""
        self.out_features, self.in_features = q.shape
        self.nbytes = q.nbytes + 4 * scale.numel()
        self._packed = torch.ops.onednn.qlinear_prepack(q.contiguous(), None)
        self._scale = scale.float().contiguous()
        self._zeros = torch.zeros(q.shape[0], dtype=torch.int64)
        self._tiny = torch.tensor(1e-30)
        self._product = torch.ops.onednn.qlinear_pointwise.default

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.shape[0]
        if not rows:
            return x.new_empty(0, self.out_features)
        wide = x if x.dtype is torch.float32 else x.float()
        step = torch.add(self._tiny, wide.abs().amax(-1, True), alpha=1 / _LARGEST)
        # Rounded by cutting off, hence the half.
        values = (wide / step).add_(_CENTRE + 0.5).to(torch.int32)
        halves = torch.empty(2 * rows, self.in_features, dtype=torch.uint8)
        halves[:rows].copy_(values)
        halves[rows:].copy_(values.bitwise_right_shift_(8))
        y = self._product(halves, 1.0, 128, self._packed, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], "")
        out = torch.add(y[:rows], y[rows:], alpha=256).mul_(step)
        if x.dtype is not torch.float32:
            out = out.to(x.dtype)
        return out if bias is None else out.add_(bias)

    def dequantised(self) -> Tensor:
        eye = torch.eye(self.in_features)
        return self.product(eye, None).T.contiguous()
