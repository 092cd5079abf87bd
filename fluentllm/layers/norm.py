"""Root-mean-square norm over the last dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.protocols import WeightSlot
from ..kernels.residual import computed
from .module import Module, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..core.protocols import BuildContext
    from ..kernels.residual import Addend, Rows


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) · weight; the checkpoint calls it `<name>.weight`."""

    def __init__(self, ctx: BuildContext, name: str, size: int, eps: float) -> None:
        self.name = name
        self.eps = eps
        self.weight = torch.ones(size, dtype=ctx.dtype, device=ctx.device)
        self._rms_norm = ctx.ops.rms_norm
        self._add_rms_norm = ctx.ops.add_rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] → the same shape."""
        return self._rms_norm(x, self.weight, self.eps)

    def enter(self, delta: Addend | None, residual: Tensor) -> Rows:
        """In front of a block: residual [T, size] += delta, in place; → norm(residual), for products."""
        if delta is None:
            return self._rms_norm(residual, self.weight, self.eps)
        if isinstance(delta, torch.Tensor):
            return self._add_rms_norm(delta, residual, self.weight, self.eps)
        return delta.add_rms_norm(residual, self.weight, self.eps)

    def leave(self, delta: Addend | None, residual: Tensor) -> Tensor:
        """Behind the last block: the same, as a tensor."""
        if delta is None:
            return self._rms_norm(residual, self.weight, self.eps)
        return self._add_rms_norm(computed(delta), residual, self.weight, self.eps)

    def own_slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(join(self.name, "weight"), tuple(self.weight.shape), self.weight.copy_, init="ones")
