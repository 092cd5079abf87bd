"""Ends the timeline of a start with the first token: an observer on the engine's public hook, like any plugin's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.protocols import RequestEvent
    from fluentllm.core.timeline import Timeline


class FirstToken:
    """Tells once how long the first request took to its first token, counted from when it came."""

    def __init__(self, timeline: Timeline, tell: Callable[[str], None]) -> None:
        self._timeline = timeline
        self._tell = tell
        self._queued: dict[str, float] = {}
        self._done = False

    @hookimpl
    def fluent_request(self, event: RequestEvent) -> None:
        if self._done:
            return
        if event.kind == "queued":
            self._queued[event.id] = time.time()
        elif event.kind == "first_token" and event.id in self._queued:
            self._done = True
            start, end = self._queued[event.id], time.time()
            self._queued.clear()
            self._timeline.add("first token", start, end)
            self._tell(f"first token {end - start:.2f} s after its request came, {self._timeline.now():.1f} s after the start")
        elif event.kind == "finished":
            self._queued.pop(event.id, None)
