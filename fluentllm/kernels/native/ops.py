"""`Ops` with the C kernels where they fit: float32 on a CPU. Whatever they are not for, `PlainOps` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..plain import PlainOps

if TYPE_CHECKING:
    from torch import Tensor

    from .library import Library

_ROWS = 64
"""With more rows torch's operations, which share the rows among threads, are as fast."""


class NativeOps(PlainOps):
    """Few rows of float32 through C, one call an operation."""

    def __init__(self, library: Library, copy_budget: int = 0) -> None:
        super().__init__(copy_budget, library)
        self._rms_norm = library.rms_norm
        self._silu_mul = library.silu_mul
        self._rotary = library.rotary

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _fits(x, weight):
            return super().rms_norm(x, weight, eps)
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._rms_norm(None, x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
        return out

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not (_fits(residual, weight) and _fits(delta, weight)):
            return super().add_rms_norm(delta, residual, weight, eps)
        out = torch.empty_like(residual)
        size = residual.shape[-1]
        rows = residual.numel() // size
        self._rms_norm(delta.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, eps)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if not _fits(gate_up, gate_up):
            return super().silu_mul(gate_up)
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
        return out

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        rows, heads, size = x.shape
        plain = interleaved or rows > _ROWS or cos.shape[-1] != size or x.dtype is not torch.float32
        if plain or x.stride(2) != 1 or x.stride(1) != size or not (cos.is_contiguous() and sin.is_contiguous()):
            return super().rotary(x, cos, sin, interleaved=interleaved)
        out = torch.empty(rows, heads, size)
        self._rotary(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), rows, heads, size, x.stride(0))
        return out


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] <= _ROWS and x.dtype is torch.float32 is weight.dtype and x.is_contiguous()
