"""Structured outputs by the library xgrammar: JSON, JSON schemas, regular expressions, choices, grammars, structural tags.

The library is the extra `fluentllm[grammar]`; it is imported for the first request that has a grammar. Its automata have a
stack, so each request gets a matcher on the host (`core.host_grammars`), and no memory of the device is set aside for tables.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from ...core.hookspecs import hookimpl

if TYPE_CHECKING:
    from ...core.protocols import GrammarCompiler, GrammarContext, Register, RegisterConfig
    from .worker import Worker

LEAST = (0, 2, 5)
"""The first version that keeps to all that `schema` lets pass."""
KINDS = ("json_object", "json_schema", "regex", "choice", "grammar", "structural_tag")


class XGrammarSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    max_whitespace: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Most whitespace in a row between parts of JSON. Null: any number, with which some models never end.",
            extra_json_schema={"unit": "characters"},
        ),
    ] = 32


class GrammarXGrammar:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(XGrammarSettings)

    @hookimpl
    def fluent_grammars(self, register: Register) -> None:
        shared = _Shared()
        for kind in KINDS:
            register(kind, _Factory(kind, shared), supports=_supports)


class _Shared:
    """For all kinds of one engine: the library, told the model's tokens by the first request, and the thread that compiles."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def worker(self, context: GrammarContext) -> Worker:
        if self._worker is None or self._worker.context is not context:
            from .worker import Worker

            settings = context.settings.plugin.get("grammar_xgrammar") or XGrammarSettings()
            self._worker = Worker(context, settings.max_whitespace)
        return self._worker


class _Factory:
    tables = False

    def __init__(self, kind: str, shared: _Shared) -> None:
        self._kind = kind
        self._shared = shared

    def __call__(self, context: GrammarContext) -> GrammarCompiler:
        return self._shared.worker(context).compiler(self._kind)


@cache
def _version() -> str | None:
    """Of the library; None if it, or what it calls its own code by, is not installed. Nothing is imported."""
    try:
        return version("xgrammar") if find_spec("xgrammar") and find_spec("tvm_ffi") else None
    except PackageNotFoundError:
        return None


def _supports(spec: Any) -> str | None:
    found, install = _version(), "pip install 'fluentllm[grammar]'"
    if found is None:
        return f"xgrammar is not installed ({install})"
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    return None if numbers >= LEAST else f"xgrammar {found} reads schemas too loosely ({install} brings a newer one)"


plugin = GrammarXGrammar()
