"""The thread that compiles: the library's import takes half a second, a large schema several, and the engine goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...core.grammars import GrammarTable
    from ...core.protocols import GrammarCompiler, GrammarContext, HostGrammar
    from .compiler import Library


class Worker:
    def __init__(self, context: GrammarContext, max_whitespace: int | None) -> None:
        self.context = context
        self._max_whitespace = max_whitespace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._library: Library | None = None

    def compiler(self, kind: str) -> GrammarCompiler:
        return _Elsewhere(self, kind)

    def submit(self, kind: str, source: str) -> Future[GrammarTable | HostGrammar]:
        return self._thread.submit(self._compile, kind, source)

    def _compile(self, kind: str, source: str) -> HostGrammar:
        from .compiler import Compiler, Library

        if self._library is None:
            self._library = Library(self.context, self._max_whitespace)
        return Compiler(kind, self._library).compile(source)


class _Elsewhere:
    """Implements `core.protocols.GrammarCompiler`."""

    def __init__(self, worker: Worker, kind: str) -> None:
        self._worker = worker
        self._kind = kind

    def compile(self, source: str) -> Future[GrammarTable | HostGrammar]:
        return self._worker.submit(self._kind, source)
