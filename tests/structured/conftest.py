"""xgrammar on the tokens of `longcat-nano`, as an engine would have it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fluentllm.core import config
from fluentllm.core.protocols import GrammarContext
from fluentllm.hub import resolve
from fluentllm.plugins.grammar_xgrammar import _supports

if TYPE_CHECKING:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

NANO = 8192
"""Tokens of `longcat-nano`."""

WHY_NOT = _supports(None)
needs_xgrammar = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def context(path: Path, vocab_size: int, eos: tuple[int, ...], **settings: Any) -> GrammarContext:
    """Of a model's spec only what a compiler of grammars reads."""
    spec: Any = SimpleNamespace(vocab_size=vocab_size, eos_token_ids=eos)
    return GrammarContext(config.load(None, settings, {}).settings, spec, path)


@pytest.fixture(scope="session")
def library() -> Library:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

    return Library(context(resolve("longcat-nano").path, NANO, (0,)), 2)
