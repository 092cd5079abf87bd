"""The proposer of `spec_mtp`: a chain (`step.chain`) of the model's own MTP layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import structs

from ...core.errors import ConfigError
from ...core.protocols import DraftReads
from ...step.chain import ChainProposer

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.batch import Batch
    from ...core.protocols import AttentionBackend, ProposerContext
    from ...core.types import ModelSpec
    from ...layers.mtp import MTP


class MTPChain:
    """A `step.chain.DraftLayer`: the states are the target's hidden states after the final norm, and the layer's after its."""

    first_key = 0
    vocabulary: Tensor | None = None

    def __init__(self, mtp: MTP, spec: ModelSpec) -> None:
        self.width = spec.hidden_size
        self.reads = DraftReads(each=(mtp, mtp.used_head), kv=structs.replace(spec.kv, layers=spec.draft_kv_layers))
        self._mtp = mtp

    def target_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, states: Tensor, batch: Batch, attention: AttentionBackend, wanted: Tensor | None = None) -> Tensor:
        return self._mtp.forward(states, batch, attention, wanted)

    def logits(self, states: Tensor) -> Tensor:
        return self._mtp.logits(states)


def create(context: ProposerContext) -> ChainProposer:
    """Raises `ConfigError` for a model without an MTP layer."""
    mtp: MTP | None = getattr(context.model, "mtp", None)
    if mtp is None:
        raise ConfigError(
            f"speculative.method is mtp, but this {context.model.spec.architecture} has no MTP layer.",
            fix="Use speculative.method=pld, or none.",
            param="speculative.method",
        )
    return ChainProposer(context, MTPChain(mtp, context.model.spec))
