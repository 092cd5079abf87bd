"""The gated feed-forward block: down(silu(gate(x)) · up(x))."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.residual import NormedRows
from .linear import Linear
from .module import Module

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.protocols import BuildContext
    from ..kernels.moe import LiveRows
    from ..kernels.residual import Product, Rows


class MLP(Module):
    """SwiGLU, [T, hidden] → [T, hidden]; gate and up are one product."""

    def __init__(self, ctx: BuildContext, prefix: str, hidden: int, inner: int, *, bias: bool = False) -> None:
        self.gate_up = Linear(ctx, prefix, hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias)
        self.down = Linear(ctx, prefix, inner, {"down_proj": hidden}, bias=bias)
        self._gated_linear = ctx.ops.gated_linear

    def __call__(self, x: Rows) -> Tensor:
        return self.down(self._inner(x))

    def later(self, x: Rows, live: LiveRows | None = None) -> Product:
        """The same, for the residual stream: the last product is computed by whoever adds it there. Of all rows: they share the
        matrices, so one more costs next to nothing."""
        return self.down.later(self._inner(x))

    def _inner(self, x: Rows) -> Tensor:
        weight, bias = self.gate_up.weight, self.gate_up.bias
        assert weight is not None
        if isinstance(x, NormedRows):
            return x.gated_linear(weight, bias)
        return self._gated_linear(x, weight, bias)
