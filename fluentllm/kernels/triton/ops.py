"""`Ops` on a GPU: products by torch, everything between them by the kernels of this room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plain import PlainOps
from . import elementwise, moe, moe_route, norm

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe import Routing
    from ..ops import ExpertWeights


class TritonOps(PlainOps):
    """`kernels.ops.Ops`. What has no kernel here, or an operand whose last dimension is not contiguous, is `PlainOps`'."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.stride(-1) != 1 or x.ndim not in (2, 3):
            return super().rms_norm(x, weight, eps)
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if delta.stride(-1) != 1 or residual.stride(-1) != 1 or residual.ndim != 2:
            return super().add_rms_norm(delta, residual, weight, eps)
        return norm.add_rms_norm(delta, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.stride(-1) != 1 or gate_up.ndim != 2:
            return super().silu_mul(gate_up)
        return elementwise.silu_mul(gate_up)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        if x.stride(-1) != 1 or x.ndim != 3:
            return super().rotary(x, cos, sin, interleaved=interleaved)
        return elementwise.rotary(x, cos, sin, interleaved=interleaved)

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        if tokens.ndim != 1:
            return super().embedding(tokens, table)
        return elementwise.embedding(tokens, table)

    def route(self, logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return moe_route.route(logits, routing, bias)

    def experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, routing: Routing, shared: Tensor | None
    ) -> Tensor:
        if experts.gate_up is None or experts.down is None:
            return super().experts(x, weights, ids.long(), experts, routing, shared)
        return moe.experts(x, weights, ids, experts.gate_up, experts.down, shared)
