"""The residual stream as layers write to it and read from it, so that a GPU may do in one launch what the text says in three:
a product, the addition to the stream, and the norm in front of the next product.

A block leaves an `Addend`; `layers.norm.RMSNorm.enter` adds it and gives the next block `Rows`. In plain torch both are tensors
by the time anyone looks; `kernels/triton/deferred_norm.py` is what a GPU makes of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import Tensor

    from .moe import Routing
    from .ops import ExpertWeights, Ops
    from .weights import Weight

    Rows: TypeAlias = "Tensor | NormedRows"
    """What a norm gives to those who multiply it: [T, D]."""
    Addend: TypeAlias = "Tensor | Pending"
    """What is still to be added to the residual stream: [T, hidden]."""


class NormedRows(ABC):
    """Rows [T, D] after a norm that its readers finish: each of its products applies what is left to do."""

    device: torch.device

    @abstractmethod
    def tensor(self) -> Tensor:
        """The normed rows themselves, [T, D]."""

    @abstractmethod
    def linear(self, weight: Weight, bias: Tensor | None) -> Tensor:
        """As `Ops.linear` of `tensor()`."""

    @abstractmethod
    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Tensor:
        """As `Ops.gated_linear`."""

    @abstractmethod
    def router_logits(self, weight: Weight) -> tuple[Tensor, Tensor]:
        """As `Ops.router_logits`; second: `tensor()`, which the experts want."""


class Pending(ABC):
    """[T, hidden], not computed yet: whoever adds it to the residual stream may do both in one launch."""

    __slots__ = ()

    @abstractmethod
    def tensor(self) -> Tensor:
        """Compute it."""

    @abstractmethod
    def add_rms_norm(self, residual: Tensor, weight: Tensor, eps: float) -> Rows:
        """residual [T, hidden] += this, in place; → rms_norm(residual)."""


class Product(Pending):
    """x Wᵀ + other: x [T, in]; other [T, out], or [out] for all rows, or None."""

    __slots__ = ("ops", "other", "weight", "x")

    def __init__(self, ops: Ops, x: Tensor, weight: Weight, other: Tensor | None = None) -> None:
        self.ops, self.x, self.weight, self.other = ops, x, weight, other

    def tensor(self) -> Tensor:
        return linear_plus(self.ops, self.x, self.weight, self.other)

    def of(self, wanted: Tensor) -> Product:
        """Of the rows `wanted` [W] int64 only."""
        other = self.other[wanted] if self.other is not None and self.other.ndim == 2 else self.other
        return Product(self.ops, self.x[wanted], self.weight, other)

    def plus(self, rows: Tensor) -> Addend:
        """With rows [T, out] added."""
        if self.other is None:
            return Product(self.ops, self.x, self.weight, rows)
        return self.ops.add(self.tensor(), rows)

    def add_rms_norm(self, residual: Tensor, weight: Tensor, eps: float) -> Rows:
        return self.ops.linear_add_rms_norm(self.x, self.weight, self.other, residual, weight, eps)


class ExpertSum(Pending):
    """What `Ops.experts` computes of the same."""

    __slots__ = ("experts", "ids", "ops", "routing", "shared", "weights", "x")

    def __init__(
        self,
        ops: Ops,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        experts: ExpertWeights,
        routing: Routing,
        shared: Tensor | None,
    ) -> None:
        self.ops, self.x, self.weights, self.ids = ops, x, weights, ids
        self.experts, self.routing, self.shared = experts, routing, shared

    def tensor(self) -> Tensor:
        return self.ops.experts(self.x, self.weights, self.ids, self.experts, self.routing, self.shared)

    def add_rms_norm(self, residual: Tensor, weight: Tensor, eps: float) -> Rows:
        return self.ops.experts_add_rms_norm(self, residual, weight, eps)


def linear_plus(ops: Ops, x: Tensor, weight: Weight, other: Tensor | None) -> Tensor:
    """x Wᵀ + other, [out] or [T, out] or None."""
    if other is None or other.ndim == 1:
        return ops.linear(x, weight, other)
    return ops.add(ops.linear(x, weight), other)


def computed(rows: Rows | Addend) -> Tensor:
    """As a tensor."""
    return rows if isinstance(rows, torch.Tensor) else rows.tensor()
