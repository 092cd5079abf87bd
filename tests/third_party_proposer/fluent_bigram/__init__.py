"""Drafts from pairs of tokens: what this plugin adds to FluentLLM. Light to import; the proposer itself is in `proposer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import Proposer, ProposerContext, Register, RegisterConfig
    from fluentllm.core.types import ModelSpec

FLUENT_API_VERSION = 1
MOST_TOKENS = 1 << 20
"""Of a vocabulary: the tables have a row for each."""


class BigramSettings(Struct, forbid_unknown_fields=True):
    """At `plugins.bigram`."""

    least: Annotated[int, Meta(ge=1, description="A pair of tokens is drafted once it has come so often in a row.")] = 1


class Bigram:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(BigramSettings)

    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register("bigram", create_proposer, supports=supports)


def supports(spec: ModelSpec) -> str | None:
    return None if spec.vocab_size <= MOST_TOKENS else f"its vocabulary has more than {MOST_TOKENS} tokens"


def create_proposer(context: ProposerContext) -> Proposer:
    from .proposer import BigramProposer

    return BigramProposer(context.tables, context.settings.plugin["bigram"].least)


plugin = Bigram()
