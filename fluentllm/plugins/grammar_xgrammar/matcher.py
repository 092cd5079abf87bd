"""Where one request's text stands in its grammar: xgrammar's matcher, and what may follow the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...core.protocols import GrammarMatcher


class CompiledGrammar:
    """Implements `core.protocols.HostGrammar`."""

    def __init__(self, start: Callable[[], Any], ends: frozenset[int]) -> None:
        """`start` makes an xgrammar matcher; `ends`: token ids that end a text."""
        self._start = start
        self._ends = ends

    def begins(self, words: int) -> bool:
        """Is there a first token, or an end? `words`: of a mask."""
        mask = memoryview(bytearray(4 * words)).cast("i")
        self.matcher().fill(mask)
        return any(mask)

    def matcher(self) -> GrammarMatcher:
        return Matcher(self._start(), self._ends)


class Matcher:
    """Implements `core.protocols.GrammarMatcher`. Behind an end there are only more ends, for requests that ignore them."""

    def __init__(self, inner: Any, ends: frozenset[int]) -> None:
        self._inner = inner
        self._ends = ends
        self._behind = 0
        """Ends that were accepted behind the first, which the library takes none of."""

    def fill(self, mask: memoryview) -> None:
        words = torch.frombuffer(mask, dtype=torch.int32)  # the same memory
        if not self._inner.is_terminated():
            self._inner.fill_next_token_bitmask(words)
            return
        for token in self._ends:
            words[token // 32] |= 1 << token % 32 if token % 32 < 31 else -(1 << 31)

    def accept(self, token: int) -> bool:
        if self._inner.is_terminated():
            self._behind += token in self._ends
            return token in self._ends
        return bool(self._inner.accept_token(token))

    def rollback(self, count: int) -> None:
        behind = min(count, self._behind)
        self._behind -= behind
        if count > behind:
            self._inner.rollback(count - behind)
