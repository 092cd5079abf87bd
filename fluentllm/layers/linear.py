"""Matrix products with weights from a checkpoint: several of its matrices side by side in one product."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..core.protocols import WeightSlot
from ..kernels.fp8_weight import side_by_side
from ..kernels.quantise import dequantise_blocks
from ..kernels.residual import NormedRows, Product
from .module import Module, join

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from ..core.protocols import BuildContext, PackedTensor
    from ..kernels.residual import Rows
    from ..kernels.weights import Weight
    from .norm import RMSNorm


log = logging.getLogger("fluentllm.engine")

TAKES_BLOCKS = ("int4", "packed", "fp8")
"""Precisions with a use for a checkpoint's blocks as they are."""


class Linear(Module):
    """x [T, in] → [T, Σ parts]: y = x Wᵀ + b, W being the parts' matrices one below the other.

    `parts`: name → rows; the checkpoint calls them `<prefix>.<name>.weight` and `.bias`. The matrix is packed as soon as all
    parts are there, so that loading a model needs little more memory than the model.
    """

    def __init__(
        self,
        ctx: BuildContext,
        prefix: str,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        precision: str | None = None,
    ) -> None:
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.prefix = prefix
        self.weight: Weight | None = None
        self.bias: Tensor | None = None
        self._ops = ctx.ops
        self._linear = ctx.ops.linear
        self._device = ctx.device
        self._dtype = ctx.dtype
        self._precision = precision or ctx.weight_precision
        self._arrived: dict[str, Tensor | PackedTensor] = {}
        if bias:
            self.bias = torch.zeros(self.out_features, dtype=ctx.dtype, device=ctx.device)

    def __call__(self, x: Rows) -> Tensor:
        assert self.weight is not None
        if isinstance(x, NormedRows):
            return x.linear(self.weight, self.bias)
        return self._linear(x, self.weight, self.bias)

    def later(self, x: Tensor) -> Product:
        """The same, for the residual stream: computed by whoever adds it there."""
        assert self.weight is not None
        return Product(self._ops, x, self.weight, self.bias)

    def with_norm(self, x: Rows, norm: RMSNorm) -> tuple[Rows, Tensor]:
        """The columns of the first parts, as many as `norm` is wide, normed, and the others as they are."""
        assert self.weight is not None
        return self._ops.linear_rms_norm(x, self.weight, self.bias, norm.weight, norm.eps)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """[T, Σ parts] → a view for each part."""
        return y.split(list(self.parts.values()), dim=-1)

    def own_slots(self) -> Iterator[WeightSlot]:
        start = 0
        for name, rows in self.parts.items():
            yield WeightSlot(
                join(self.prefix, name, "weight"),
                (rows, self.in_features),
                partial(self._take, name),
                partial(self._take_packed, name) if self._precision in TAKES_BLOCKS else None,
            )
            if self.bias is not None:
                yield WeightSlot(join(self.prefix, name, "bias"), (rows,), self.bias[start : start + rows].copy_)
            start += rows

    def _take(self, name: str, tensor: Tensor) -> None:
        self._arrived[name] = tensor.to(self._device, torch.float32 if tensor.device.type == "cpu" else self._dtype, copy=True)
        self._pack_if_complete()

    def _take_packed(self, name: str, packed: PackedTensor) -> bool:
        if packed.kind == "fp8_block":
            # A copy: what a reader hands out may be part of something larger, at any address.
            packed = replace(packed, parts={key: part.to(self._device, copy=True) for key, part in packed.parts.items()})
        self._arrived[name] = packed
        self._pack_if_complete()
        return True

    def _pack_if_complete(self) -> None:
        if len(self._arrived) < len(self.parts):
            return
        arrived = [self._arrived[name] for name in self.parts]
        self._arrived = {}
        self.weight = self._pack_blocks(arrived)
        if self.weight is None:
            floats = [part if isinstance(part, torch.Tensor) else dequantise_blocks(part.kind, part.parts) for part in arrived]
            weight = floats[0] if len(floats) == 1 else torch.cat(floats)
            self.weight = self._ops.pack(weight, self._precision)

    def _pack_blocks(self, arrived: list[Tensor | PackedTensor]) -> Weight | None:
        """As the checkpoint has them, if all parts are blocks of one kind."""
        packed = [part for part in arrived if not isinstance(part, torch.Tensor)]
        if len(packed) < len(arrived) or len({part.kind for part in packed}) > 1:
            return None
        if packed[0].kind != "fp8_block":
            parts = {key: torch.cat([part.parts[key] for part in packed]) for key in packed[0].parts}
            return self._ops.pack_blocks(packed[0].kind, parts, self._precision)
        both = side_by_side([(part.parts["q"], part.parts["scale"]) for part in packed])
        if both is None:
            names, rows = ", ".join(self.parts), list(self.parts.values())
            log.warning(
                "%s: %s have %s rows, not multiples of 128, so they share no blocks: dequantised.", self.prefix, names, rows
            )
            return None
        return self._ops.pack_blocks("fp8_block", {"q": both[0], "scale": both[1]}, self._precision)
