"""Proposers of tests' own, made from a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.protocols import Proposer, ProposerContext, Register

Draft = Any
"""(batch, hidden, slots, count) → (drafts, valid), as `Proposer.draft`; with the slot tables first."""


class Proposing:
    def __init__(self, context: ProposerContext, draft: Draft) -> None:
        self._context, self._draft = context, draft

    def draft(self, *args: Any) -> Any:
        return self._draft(self._context.tables, *args)


class Plugin:
    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        make: Callable[[ProposerContext], Proposer] = lambda context: Proposing(context, self._draft)  # noqa: E731
        register("test", make)


def plugins_with(draft: Draft) -> PluginManager:
    """A plugin manager with the proposer `test` of the plugin `testing`."""
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"testing": Plugin(draft)})
