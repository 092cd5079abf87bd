"""The engine's side of a handoff: pages for a prompt that comes from elsewhere, and its way into a slot without a prefill."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from .errors import FluentError, QueueFull
from .sequence import Phase
from .types import SlotResult

if TYPE_CHECKING:
    from .engine import Engine
    from .kv.pages import Lease
    from .sequence import Sequence
    from .types import FinishReason, FromEngine, HandoffReport, Request, TokenLogprob

BEAT = 0.2
"""Seconds between two signs of life of an engine whose only work is other engines'."""


class EngineHost:
    """Implements `core.handoff.Host`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.kv = engine.kv
        self._peers_requests = engine.connect(_ignore)
        # A step verifies up to max_k drafts past the first token, and leaves as many.
        self._ahead = 1 + (2 * engine.draft_length.max_k if engine.draft_length is not None else 0)

    @property
    def waiting(self) -> int:
        return self._engine.scheduler.waiting

    def expect(self, sequence: Sequence, label: str) -> Lease | None:
        return self.kv.expect(sequence, sequence.prompt_length + self._ahead, label)

    def give_up(self, sequence: Sequence) -> None:
        self.kv.release(sequence)

    def arrived(self, sequence: Sequence, token: int, logprob: TokenLogprob | None, report: HandoffReport) -> None:
        engine = self._engine
        finished: FinishReason | None = None
        if token in sequence.stop_ids:
            finished = "stop"
        elif sequence.request.params.max_tokens == 1:
            finished = "length"
        sequence.prefilled = sequence.prompt_length
        self.kv.publish(sequence, sequence.prompt_length)
        wanted = sequence.request.params.logprobs is not None and logprob is not None
        result = SlotResult(-1, sequence.generation, [token], finished, [logprob] if wanted and logprob is not None else None)
        try:
            engine.bring(sequence, result, report)
        except FluentError as error:
            self.kv.release(sequence)
            self.refuse(sequence, error)
            return
        if finished is None:
            engine.resume(sequence)
        else:
            self.kv.release(sequence)
        engine.wake()

    def compute(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        sequence.prefilled = 0
        try:
            self._engine.scheduler.add(sequence)
        except QueueFull as error:
            self.refuse(sequence, error)
        self._engine.wake()

    def submit(self, request: Request) -> None:
        self._peers_requests.submit(request)

    def withdraw(self, request_id: str) -> None:
        self._peers_requests.abort([request_id])

    def refuse(self, sequence: Sequence, error: FluentError) -> None:
        self._engine.refuse(sequence, error)
        self._engine.wake()

    def wake(self) -> None:
        self._engine.wake()

    def fail(self, error: Exception) -> None:
        self._engine.fail(error)


async def woken(engine: Engine, wake: asyncio.Event) -> None:
    """The engine's loop has nothing to do until `wake` is set. Open handoffs may keep it so for long, pages in quarantine for
    ever: no step comes meanwhile, and yet nothing hangs. Requests in the scheduler's hands may not wait for nothing."""
    while engine.has_work and not (engine.scheduler.waiting or engine.scheduler.running):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), BEAT)
            return
        engine.last_progress = time.monotonic()
    await wake.wait()


def _ignore(message: FromEngine) -> None:
    """Peers are told what they need by the handoffs."""
