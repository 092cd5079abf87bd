"""`Ops` of a GPU for few rows, with norms shared out between the products around them (`normed.py`): two launches a layer less.

For BF16: a factor that comes after the product instead of before it can take float16 out of its range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..residual import NormedRows
from ..weights import DenseWeight
from . import linear_tiles, moe_scores
from .normed import NormAfter, Normed
from .ops import TritonOps, grouped_experts
from .streamed_weight import Streamed

if TYPE_CHECKING:
    from torch import Tensor

    from ..ops import Ops
    from ..residual import ExpertSum, Rows
    from ..weights import Weight

DEFER = True
"""False: every norm is a launch (benchmarks/kernels/launches.py compares)."""


class DeferredRows(NormedRows):
    """What a product left of a norm, for the products that read it."""

    __slots__ = ("_ops", "device", "normed")

    def __init__(self, normed: Normed, ops: Ops) -> None:
        self.normed, self.device, self._ops = normed, normed.rows.device, ops

    def tensor(self) -> Tensor:
        return self.normed.tensor()

    def linear(self, weight: Weight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, Streamed) and weight.streams(self.normed.rows):
            return weight.stream(self.normed, bias)
        return self._ops.linear(self.tensor(), weight, bias)

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Tensor:
        if bias is None and isinstance(weight, Streamed) and weight.streams(self.normed.rows):
            return weight.gated(self.normed)
        return self._ops.gated_linear(self.tensor(), weight, bias)

    def router_logits(self, weight: Weight) -> tuple[Tensor, Tensor]:
        if isinstance(weight, DenseWeight):
            return moe_scores.normed_router_logits(self.normed, weight.weight)
        rows = self.tensor()
        return self._ops.router_logits(rows, weight), rows


class DeferringOps(TritonOps):
    """`kernels.ops.Ops`."""

    def linear_add_rms_norm(
        self, x: Tensor, weight: Weight, other: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> Rows:
        if not (_defers(x, weight) and residual.ndim == 2 and residual.stride(1) == 1):
            return super().linear_add_rms_norm(x, weight, other, residual, norm, eps)
        assert isinstance(weight, Streamed)
        normed, _ = weight.stream_norm(x, NormAfter(norm, eps, residual), other)
        return DeferredRows(normed, self)

    def linear_rms_norm(self, x: Rows, weight: Weight, bias: Tensor | None, norm: Tensor, eps: float) -> tuple[Rows, Tensor]:
        rows = x.normed if isinstance(x, DeferredRows) else x
        width = norm.shape[0]
        if isinstance(rows, NormedRows) or not _defers(rows, weight):
            return super().linear_rms_norm(x, weight, bias, norm, eps)
        assert isinstance(weight, Streamed)
        if not weight.takes_norm(_tokens(rows), width):
            return super().linear_rms_norm(x, weight, bias, norm, eps)
        normed, y = weight.stream_norm(rows, NormAfter(norm, eps), bias)
        return DeferredRows(normed, self), y[:, width:]

    def experts_add_rms_norm(self, addend: ExpertSum, residual: Tensor, norm: Tensor, eps: float) -> Rows:
        few = addend.x.shape[0] <= linear_tiles.MOST_TOKENS and addend.x.dtype is torch.bfloat16
        if not (DEFER and few and addend.experts.gate_up is not None and residual.stride(1) == 1):
            return super().experts_add_rms_norm(addend, residual, norm, eps)
        after = NormAfter(norm, eps, residual)
        normed = grouped_experts(addend.x, addend.weights, addend.ids, addend.experts, addend.shared, after)
        assert isinstance(normed, Normed)
        return DeferredRows(normed, self)


def _tokens(x: Tensor | Normed) -> int:
    return (x if isinstance(x, torch.Tensor) else x.rows).shape[0]


def _defers(x: Tensor | Normed, weight: Weight) -> bool:
    rows = x if isinstance(x, torch.Tensor) else x.rows
    return DEFER and rows.dtype is torch.bfloat16 and isinstance(weight, Streamed) and weight.streams(rows)
