"""Compilers of grammars, and matchers that run on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from ..grammars import GrammarTable
    from ..settings import Settings
    from ..types import ModelSpec


@dataclass(frozen=True, slots=True)
class GrammarContext:
    """What a compiler of grammars is made from."""

    settings: Settings
    spec: ModelSpec
    """With the vocabulary's size and the end-of-sequence ids, which a state where the text may end must allow."""
    path: Path
    """The model's folder or GGUF file, where its tokenizer is: `fluentllm.frontend.tokenizer.load_tokenizer` reads both."""


class GrammarCompiler(Protocol):
    """What `fluent_grammars` factories make; the name that one is registered under is the kind of its grammars.

    A factory with an attribute `tables = False` says that its compilers never give a table: where no other plugin does, no
    memory of the device is set aside for tables."""

    def compile(self, source: str) -> GrammarTable | HostGrammar | Future[GrammarTable | HostGrammar]:
        """Called in the engine's loop, once for each grammar in use. A table if the grammar can be one: its requests run ahead
        like any others. Raises `InvalidRequest` for a source that is none. The engine keeps what was compiled.

        One that takes long returns a future of it, and what it raises is the future's: only the requests that need it wait."""
        ...


class HostGrammar(Protocol):
    """A grammar that is no table over the model's tokens, such as one with a stack."""

    def matcher(self) -> GrammarMatcher:
        """At the grammar's start; one for each request."""
        ...


class GrammarMatcher(Protocol):
    """Where one request's text stands in its grammar. Called in the engine's loop, about once a token and draft: it must be
    quick. What it raises ends its request."""

    def fill(self, mask: memoryview) -> None:
        """Set the bits of all tokens that may come next. mask: ceil(vocab / 32) words "i", all 0; token t is bit t % 32 of word
        t // 32. Where the text may end, the model's end-of-sequence ids are among them."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token; False, and no change, if the grammar forbids it."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens; at most as many as there are drafts a step."""
        ...
