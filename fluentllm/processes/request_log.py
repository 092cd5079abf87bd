"""One log line for each finished request (`log.requests`): an observer on the engine's public hook, like any plugin's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import RequestEvent

log = logging.getLogger("fluentllm.requests")


class RequestLog:
    def __init__(self) -> None:
        self._times: dict[str, dict[str, float]] = {}
        """Request id → kind of event → its time."""

    @hookimpl
    def fluent_request(self, event: RequestEvent) -> None:
        times = self._times.setdefault(event.id, {})
        times.setdefault(event.kind, event.time)
        if event.kind != "finished":
            return
        del self._times[event.id]
        start = times.get("queued", event.time)
        details = event.details
        first = f", first after {times['first_token'] - start:.3f} s" if "first_token" in times else ""
        log.info(
            "%s: %s, %d prompt tokens (%d cached), %d new in %.3f s%s",
            event.id,
            details["reason"],
            details["prompt_tokens"],
            details["cached_tokens"],
            details["generated_tokens"],
            event.time - start,
            first,
        )
