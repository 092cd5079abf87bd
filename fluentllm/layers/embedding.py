"""Token embedding, and the head that turns hidden states into logits; some models tie the two to one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.protocols import WeightSlot
from .module import Module, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..core.protocols import BuildContext, PackedTensor
    from ..kernels.weights import Weight


class Embedding(Module):
    """tokens [T] int64 → [T, size] in the context's dtype; `<name>.weight` in the checkpoint."""

    def __init__(self, ctx: BuildContext, name: str, rows: int, size: int) -> None:
        self.name = name
        self.table = torch.zeros(rows, size, dtype=ctx.dtype, device=ctx.device)
        self._embedding = ctx.ops.embedding

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._embedding(tokens, self.table)

    def own_slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(join(self.name, "weight"), tuple(self.table.shape), self.table.copy_)


class Head(Module):
    """hidden [R, size] → logits [R, vocab] float32. `name` is `lm_head`, or the embedding's where the two are tied: then the
    checkpoint's one tensor fills both (the head keeps its own copy, packed for products)."""

    def __init__(self, ctx: BuildContext, name: str, rows: int, size: int) -> None:
        self.name = name
        self.shape = (rows, size)
        self.weight: Weight | None = None
        self._ops = ctx.ops
        # Four bits cost too much here: with them SmolLM2 keeps 91 % of its most likely tokens, with eight 98 %. FP8 has three
        # bits of mantissa, and DeepSeek's FP8 checkpoints keep the head in 16 bits.
        self._precision = {"int4": "int8", "fp8": str(ctx.dtype).removeprefix("torch.")}.get(
            ctx.weight_precision, ctx.weight_precision
        )
        self._device = ctx.device
        self._dtype = ctx.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._ops.logits(hidden, self.weight)

    def own_slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(join(self.name, "weight"), self.shape, self._take, self._take_packed)

    def _take(self, tensor: Tensor) -> None:
        self.weight = self._ops.pack(tensor.to(self._device), self._precision)

    def _take_packed(self, packed: PackedTensor) -> bool:
        if packed.kind == "fp8_block":
            return False
        self.weight = self._ops.pack_blocks(packed.kind, packed.parts, self._precision)
        return self.weight is not None
