"""Plugin: drafts by the model's own multi-token prediction (MTP) layer, as DeepSeek-V3 and LongCat-Flash carry one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.protocols import DraftMemory

if TYPE_CHECKING:
    from fluentllm.core.protocols import DraftTarget, Proposer, ProposerContext, Register
    from fluentllm.core.types import ModelSpec

FLUENT_API_VERSION = 1


class MTPFactory:
    """A `core.protocols.ProposerFactory`."""

    def __call__(self, context: ProposerContext) -> Proposer:
        from .proposer import create

        return create(context)

    def memory(self, target: DraftTarget) -> DraftMemory:
        """The layer's KV, and one hidden state a page."""
        spec = target.spec
        return DraftMemory(kv_layers=spec.draft_kv_layers, bytes_per_page=spec.hidden_size * target.value_bytes)


def _supports(spec: ModelSpec) -> str | None:
    if spec.draft_kv_layers:
        return None
    return f"this checkpoint of {spec.architecture} has no MTP layer"


class SpecMTP:
    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register("mtp", MTPFactory(), supports=_supports)


plugin = SpecMTP()
