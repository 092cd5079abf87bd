"""The gated feed-forward block: down(silu(gate(x)) · up(x))."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import Linear
from .module import Module

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.protocols import BuildContext


class MLP(Module):
    """SwiGLU, [T, hidden] → [T, hidden]; gate and up are one product."""

    def __init__(self, ctx: BuildContext, prefix: str, hidden: int, inner: int, *, bias: bool = False) -> None:
        self.gate_up = Linear(ctx, prefix, hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias)
        self.down = Linear(ctx, prefix, inner, {"down_proj": hidden}, bias=bias)
        self._gated_linear = ctx.ops.gated_linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._gated_linear(x, self.gate_up.weight, self.gate_up.bias))
