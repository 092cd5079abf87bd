"""Compilers of grammars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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
    """The model's folder or file, where its tokenizer is."""


class GrammarCompiler(Protocol):
    """What `fluent_grammars` factories make; the name that one is registered under is the kind of its grammars."""

    def compile(self, source: str) -> GrammarTable:
        """Called in the engine's loop, once for each grammar in use. Raises `InvalidRequest` for a source that is none, or a
        grammar that is no finite table over the model's tokens."""
        ...
