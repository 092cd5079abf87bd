"""Plugin: drafts by an EAGLE or EAGLE-3 draft model, in the layout of public checkpoints (`speculative.model`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.protocols import DraftMemory

if TYPE_CHECKING:
    from fluentllm.core.protocols import DraftContext, DraftTarget, Proposer, ProposerContext, Register

FLUENT_API_VERSION = 1


class EagleFactory:
    """A `core.protocols.ProposerFactory`."""

    def memory(self, target: DraftTarget) -> DraftMemory:
        """The layer's KV, of its own shape, and one state a page. Raises `ConfigError` for a draft model that does not fit."""
        from .config import read_config

        config = read_config(target)
        return DraftMemory(kv=config.kv(), bytes_per_page=config.hidden * target.value_bytes)

    def load(self, context: DraftContext) -> Any:
        from .loading import load_draft

        return load_draft(context)

    def __call__(self, context: ProposerContext) -> Proposer:
        from fluentllm.step.chain import ChainProposer

        return ChainProposer(context, context.draft)


class SpecEagle:
    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register("eagle", EagleFactory())


plugin = SpecEagle()
