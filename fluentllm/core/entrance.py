"""A request's way in: its grammar is got, then it goes to the scheduler, or to who waits for its prompt's KV from elsewhere.

A compiler of grammars that takes long gives a `Future` (`core.protocols.GrammarCompiler`). Until it is done its requests are in
nobody's hands, while the others go on; then they go where they would have gone at once, in the order in which they came, or are
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from .errors import FluentError, QueueFull

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .engine import Engine
    from .sequence import Sequence

log = logging.getLogger(__name__)

MOST = 256
"""Requests that may wait for grammars."""


class Entrance:
    """Used in the engine's loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: set[Sequence] = set()

    def __len__(self) -> int:
        """Requests that wait for grammars."""
        return len(self._waiting)

    def enter(self, sequence: Sequence) -> None:
        """At once, or when its grammar is compiled; what is wrong then reaches its connection. Raises `FluentError`."""
        engine = self._engine
        compiling = engine.grammars.begin(sequence)
        if compiling is not None:
            self._wait(sequence, compiling)
            return
        try:
            handoffs = engine.handoffs if sequence.request.handoff is not None else None
            if handoffs is None or not handoffs.adopt(sequence):
                engine.scheduler.add(sequence)
        except Exception:  # a plugin's bug too: its session goes on
            engine.grammars.end(sequence)
            raise
        engine.wake()

    def leave(self, sequence: Sequence) -> bool:
        """It waits no more; False if it did not."""
        waited = sequence in self._waiting
        self._waiting.discard(sequence)
        return waited

    def _wait(self, sequence: Sequence, compiling: Future[Any]) -> None:
        if len(self._waiting) >= MOST:
            raise QueueFull("Too many requests wait for their grammars to be compiled.", fix="Try again later.")
        self._waiting.add(sequence)
        loop = asyncio.get_running_loop()

        def done(future: Future[Any]) -> None:
            # The loop may have ended; then nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._compiled, sequence)

        compiling.add_done_callback(done)

    def _compiled(self, sequence: Sequence) -> None:
        if not self.leave(sequence):
            return
        engine = self._engine
        try:
            self.enter(sequence)
        except Exception as error:
            if not isinstance(error, FluentError):  # a plugin's bug, which must not take the other requests along
                log.exception("request %s could not be submitted", sequence.request.id)
                error = FluentError(f"The engine failed on this request: {error!r}.")
            engine.count_refusal(error)
            engine.refuse(sequence, error)
            engine.wake()
