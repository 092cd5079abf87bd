"""What the engine's half learns from the observers' hooks: latencies, and how requests ended.

Times are the engine's: from the moment a request came over the socket (queued) to the collection of the step that brought
the token. A step of 256 sequences is one pass over its results, so the loop pays about a quarter of a microsecond each.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .histogram import Histogram

if TYPE_CHECKING:
    from fluentllm.core.protocols import RequestEvent
    from fluentllm.core.types import StepResult

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)
TOKENS = tuple(float(2**power) for power in range(18))


class Latencies:
    """Fed by the engine's loop, read by a scrape in the same loop."""

    def __init__(self) -> None:
        self.queue = Histogram(SECONDS)
        """Queued → first scheduled."""
        self.first_token = Histogram(SECONDS)
        """Queued → first token."""
        self.between_tokens = Histogram(TOKEN_SECONDS)
        """Between two outputs of a request, divided by the tokens that the second brought: once a token."""
        self.whole = Histogram(SECONDS)
        """Queued → finished, of those that finished otherwise than by an abort."""
        self.prompt_tokens = Histogram(TOKENS)
        self.generated_tokens = Histogram(TOKENS)
        self.step_seconds = Histogram(TOKEN_SECONDS)
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.steps = 0
        self._queued: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._last: dict[int, tuple[int, float]] = {}
        """Slot → generation of who is in it, and when it last got a token."""

    def request(self, event: RequestEvent) -> None:
        if event.kind == "queued":
            self._queued[event.id] = event.time
            self._waiting.add(event.id)
            return
        queued = self._queued.get(event.id)
        if queued is None:
            return
        if event.kind == "scheduled":
            # Again after a preemption: that is no queueing.
            if event.id in self._waiting:
                self._waiting.discard(event.id)
                self.queue.observe(event.time - queued)
        elif event.kind == "first_token":
            self.first_token.observe(event.time - queued)
        else:
            self._finish(event, queued)

    def _finish(self, event: RequestEvent, queued: float) -> None:
        del self._queued[event.id]
        self._waiting.discard(event.id)
        reason = event.details["reason"]
        if reason == "refused":
            return  # counted by its error's code, like those that are refused before they wait for anything
        self.finished[reason] = self.finished.get(reason, 0) + 1
        if reason != "abort":
            self.whole.observe(event.time - queued)
        self.prompt_tokens.observe(event.details["prompt_tokens"])
        self.generated_tokens.observe(event.details["generated_tokens"])

    def step(self, result: StepResult) -> None:
        now = time.monotonic()
        self.steps += 1
        self.step_seconds.observe(result.seconds)
        last, observe = self._last, self.between_tokens.observe
        for slot in result.slots:
            count = len(slot.tokens)
            if not count:
                continue
            before = last.get(slot.slot)
            if before is not None and before[0] == slot.generation:
                observe((now - before[1]) / count, count)
            if slot.finished is None:
                last[slot.slot] = slot.generation, now
            else:
                last.pop(slot.slot, None)
