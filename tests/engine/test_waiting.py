"""What the watchdog sees of an engine that waits: others may take their time, its own requests may not wait for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fluentllm.core import handoff_host

from .harness import Harness


class Open:
    """In place of `core.handoff.Handoffs`: some are open, and nobody says anything."""

    watcher = None
    open = 1

    def start(self, host: Any) -> None: ...

    def abort(self, sequence: Any) -> bool:
        return False

    def turn(self) -> None: ...

    def planned(self, plan: Any, sequences: Any) -> None: ...

    def stats(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


async def test_open_handoffs_are_no_hang(tiny: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_host, "BEAT", 0.02)
    async with tiny.engine() as running:
        engine, handoffs = running.engine, Open()
        engine.handoffs = handoffs  # type: ignore[assignment]
        await running.tokens([5, 6], max_tokens=2)
        async with asyncio.timeout(10):
            for _ in range(3):
                before = engine.last_progress
                assert engine.has_work
                while engine.last_progress == before:
                    await asyncio.sleep(0.01)

        # A remote writer has all pages, and a request waits for them: that is what a watchdog is for.
        allocator = engine.kv.allocator
        engine.clear_cache()
        lease = allocator.lease("remote", "a writer")
        allocator.allocate(lease, allocator.free)
        waiting = running.submit([5, 6], max_tokens=2)
        await asyncio.sleep(0.1)
        before = engine.last_progress
        await asyncio.sleep(0.2)
        assert engine.last_progress == before
        allocator.release(lease)
        engine.wake()
        await running.rest(waiting)
        handoffs.open = 0
        engine.wake()
