"""Token embedding, and the head that turns hidden states into logits; some models tie the two to one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.protocols import WeightSlot
from .module import Module, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import BuildContext, PackedTensor
    from ..kernels.weights import Weight
    from .norm import RMSNorm


class Embedding(Module):
    """tokens [T] int64 → [T, size] in the context's dtype; `<name>.weight` in the checkpoint."""

    def __init__(self, ctx: BuildContext, name: str, rows: int, size: int) -> None:
        self.name = name
        self.table = torch.zeros(rows, size, dtype=ctx.dtype, device=ctx.device)
        self._embedding, self._draft_input = ctx.ops.embedding, ctx.ops.draft_input

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._embedding(tokens, self.table)

    def with_states(self, batch: Batch, states: Tensor, token_norm: RMSNorm, state_norm: RMSNorm) -> Tensor:
        """What a draft layer begins with: states [T, size], of the positions before the batch's rows, zeros being taken at
        position 0 → [token_norm(embedding) ; state_norm(state)], [T, 2 · size]. Both norms have one epsilon."""
        return self._draft_input(
            batch.tokens, batch.positions, self.table, states, token_norm.weight, state_norm.weight, token_norm.eps
        )

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
