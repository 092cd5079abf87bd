"""Proposers of tests' own, made from a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager

if TYPE_CHECKING:
    from fluentllm.core.protocols import ProposerContext, Register

Draft = Any
"""(batch, hidden, slots, count) → (drafts, valid), as `Proposer.draft`; with the slot tables first."""


class Proposing:
    def __init__(self, context: ProposerContext, draft: Draft) -> None:
        self._context, self._draft = context, draft

    def draft(self, *args: Any) -> Any:
        return self._draft(self._context.tables, *args)


class Offering:
    """Registers any factory as a proposer."""

    def __init__(self, factory: Any, name: str = "test") -> None:
        self._factory, self._name = factory, name

    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register(self._name, self._factory)


class Plugin(Offering):
    """Registers the proposer `test`, which drafts so."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(lambda context: Proposing(context, draft))


def plugins_with(draft: Draft) -> PluginManager:
    """With the proposer `test` of the plugin `testing`, which drafts so."""
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"testing": Plugin(draft)})


def plugins_offering(factory: Any, name: str = "test") -> PluginManager:
    """With a proposer of the plugin `testing`, which this factory makes."""
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"testing": Offering(factory, name)})
