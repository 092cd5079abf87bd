"""The stack of layers that a model is, from its embedding to its final norm; it can give what enters some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..kernels.residual import computed
from .module import Module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import AttentionBackend
    from ..kernels.residual import Addend
    from .norm import RMSNorm


class Trunk(Module):
    """Base of models. A layer takes (delta, residual, rotary rows, batch, backend): `delta` is what is still to be added to
    `residual`, which changes in place; it returns what it leaves to be added."""

    layers: Sequence[Any]
    norm: RMSNorm
    taps: tuple[int, ...] = ()
    """Layers whose inputs a pass leaves in `Batch.layer_inputs`."""

    def tap(self, layers: Sequence[int]) -> None:
        """Ask for the hidden states at the input of these layers, 0 … number of layers (the last: what the final norm gets),
        in increasing order. Raises `ValueError`. Once, at assembly: a captured step holds what was asked for then."""
        wanted = tuple(layers)
        if list(wanted) != sorted(set(wanted)) or not all(0 <= layer <= len(self.layers) for layer in wanted):
            raise ValueError(f"layers {list(wanted)} of {len(self.layers)}: they must increase, from 0 on")
        self.taps = wanted

    def run_layers(self, residual: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, attention: AttentionBackend) -> Tensor:
        """residual [T, hidden], the embedded tokens (changed in place) → hidden states after the final norm, [T, hidden]."""
        if self.taps:
            batch.layer_inputs = []
        delta: Addend | None = None
        for number, layer in enumerate(self.layers):
            if number in self.taps:
                delta = _keep(batch, delta, residual)
            delta = layer(delta, residual, rope, batch, attention)
        if len(self.layers) in self.taps:
            delta = _keep(batch, delta, residual)
        return self.norm.leave(delta, residual)


def _keep(batch: Batch, delta: Addend | None, residual: Tensor) -> Tensor | None:
    """Leave the layer's input in the batch → delta, computed."""
    if delta is None:
        # A copy, since the layers change `residual` in place.
        batch.layer_inputs.append(residual.clone())
        return None
    delta = computed(delta)
    batch.layer_inputs.append(residual + delta)
    return delta
