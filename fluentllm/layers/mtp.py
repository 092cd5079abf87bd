"""Multi-token prediction: the draft layer that some checkpoints carry, and the model that holds one.

`MTP.forward` is what a proposer calls. It keeps its KV in layers of its own, after the target's: index t belongs to the pair
(target's hidden state at t - 1, token at t), so a page depends on no later token. Formula: DeepSeek-V3 (arXiv:2412.19437,
section 2.2), taking the hidden states after the target's final norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from ..core.errors import CheckpointError
from ..kernels.weights import DenseWeight
from .embedding import Embedding, Head
from .linear import Linear
from .mla import MLALayer
from .module import Module, join
from .norm import RMSNorm
from .trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import AttentionBackend, BuildContext, PackedTensor, WeightSlot
    from ..core.types import ModelSpec


@dataclass(frozen=True, slots=True)
class MTPNames:
    """Where a checkpoint keeps the parts; whole names without `.weight`."""

    layer: str
    """Prefix of `eh_proj` and of the decoder layer."""
    embedding: str
    token_norm: str
    hidden_norm: str
    norm: str
    head: str | None = None
    """None: the target's head."""


class MTP(Module):
    """One draft layer."""

    def __init__(self, ctx: BuildContext, names: MTPNames, vocab: int, hidden: int, eps: float, layer: MLALayer) -> None:
        self.embedding = Embedding(ctx, names.embedding, vocab, hidden)
        self.token_norm = RMSNorm(ctx, names.token_norm, hidden, eps)
        self.hidden_norm = RMSNorm(ctx, names.hidden_norm, hidden, eps)
        self.project = Linear(ctx, names.layer, 2 * hidden, {"eh_proj": hidden})
        self.layer = layer
        self.norm = RMSNorm(ctx, names.norm, hidden, eps)
        self.head = Head(ctx, names.head, vocab, hidden) if names.head else None
        # Held by a function: as a module it would count as the draft's.
        self._target_head: Callable[[], Head] | None = None

    @property
    def kv_layer(self) -> int:
        """Its layer in the KV pool."""
        return self.layer.attention.layer

    def forward(self, hidden: Tensor, batch: Batch, attention: AttentionBackend, wanted: Tensor | None = None) -> Tensor:
        """hidden [T, hidden]: for each row of the batch the state, after the final norm, at the position before: the target's,
        or what this returned for that position → [T, hidden], after this layer's norm: what the token at the row's position
        + 1 is drafted from. A row at position 0 has no state before it: zeros are taken there. With `wanted` [W] int64 only
        these rows are returned, and the others cost no more than their KV."""
        attention.begin(batch)
        # A launch of torch's, in front of those that may overlap each other.
        rows = self.layer.attention.rotary.rows(batch.positions)
        both = self.embedding.with_states(batch, hidden, self.token_norm, self.hidden_norm)
        if wanted is not None and not wanted.shape[0]:
            normed, _ = self.project.with_norm(both, self.layer.input_norm)
            self.layer.attention.append(normed, rows, batch, attention)
            return hidden[:0]
        residual = self.project(both)
        if wanted is None:
            return self.norm.leave(self.layer(None, residual, rows, batch, attention), residual)
        return self.norm.leave(*self.layer.some_rows(residual, rows, batch, attention, wanted))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab] float32."""
        return self.used_head(hidden)

    @property
    def used_head(self) -> Head:
        """Its own, or the target's."""
        head = self.head or (self._target_head and self._target_head())
        if head is None:
            raise RuntimeError("the head of an MTP layer before DraftingModel.finalize")
        return head

    def share(self, embedding: Embedding, head: Head, arrived: set[str]) -> None:
        """Take the target's embedding and head where the checkpoint has none for the draft layer, or a mere copy."""
        if join(self.embedding.name, "weight") not in arrived or torch.equal(self.embedding.table, embedding.table):
            self.embedding = embedding
        if self.head is not None and (join(self.head.name, "weight") not in arrived or _same(self.head, head)):
            self.head = None
        self._target_head = lambda: head

    def borrowable(self) -> set[str]:
        """Tensors that may be the target's."""
        names = [self.embedding.name] if self.head is None else [self.embedding.name, self.head.name]
        return {join(name, "weight") for name in names}


class DraftingModel(Trunk):
    """A `core.protocols.Model` that may hold an MTP layer: its tensors may all be missing, then `mtp` is None after loading
    and `spec.draft_kv_layers` 0."""

    spec: ModelSpec
    embedding: Embedding
    head: Head
    mtp: MTP | None

    def __init__(self) -> None:
        self._arrived: set[str] = set()

    def weight_slots(self) -> Iterator[WeightSlot]:
        draft = {id(module) for module in self.mtp.modules()} if self.mtp is not None else set()
        borrowable = self.mtp.borrowable() if self.mtp is not None else set()
        for module in self.modules():
            for slot in module.own_slots():
                yield self._optional(slot, slot.name not in borrowable) if id(module) in draft else slot

    def finalize(self) -> None:
        self._settle_draft()
        super().finalize()

    def _settle_draft(self) -> None:
        if self.mtp is None:
            return
        names = {slot.name for slot in self.mtp.weight_slots() if not slot.optional}
        missing = names - self._arrived - self.mtp.borrowable()
        if not self._arrived & names:
            self.mtp = None
            self.spec = structs.replace(self.spec, draft_kv_layers=0)
        elif missing:
            raise CheckpointError(
                f"The checkpoint holds part of an MTP layer only: {len(missing)} missing: {', '.join(sorted(missing)[:12])}.",
                fix="Finish the download, or remove the MTP layer's tensors.",
            )
        else:
            self.mtp.share(self.embedding, self.head, self._arrived)

    def _optional(self, slot: WeightSlot, drafts: bool) -> WeightSlot:
        def load(tensor: Tensor) -> None:
            self._arrived.add(slot.name)
            slot.load(tensor)

        def load_packed(packed: PackedTensor) -> bool:
            taken = slot.load_packed is not None and slot.load_packed(packed)
            if taken:
                self._arrived.add(slot.name)
            return taken

        return replace(slot, load=load, load_packed=load_packed if slot.load_packed else None, optional=True, drafts=drafts)


def _same(one: Head, other: Head) -> bool:
    a, b = one.weight, other.weight
    return isinstance(a, DenseWeight) and isinstance(b, DenseWeight) and torch.equal(a.weight, b.weight)
