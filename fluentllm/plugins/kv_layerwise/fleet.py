"""Engines of one role as `fluent proxy` knows them: whose turn it is, which are down, and who waits for one to come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

log = logging.getLogger("fluentllm.proxy")

PROBE_EVERY = 0.25
"""Seconds between two looks at an engine that is down."""
PROBE_TIMEOUT = 5.0
"""Seconds after which a look is given up."""


@dataclass(slots=True, eq=False)
class Backend:
    """One engine."""

    url: str
    up: bool = True
    door: tuple[str, int] | None = None
    """Host and port of its control connections. Asked for again when it was down: it may have another one."""
    probing: asyncio.Task[None] | None = None


class Fleet:
    """Used in one event loop. An engine is taken for up until it fails to answer, and then again when its /health says so."""

    def __init__(self, client: httpx.AsyncClient, urls: Sequence[str]) -> None:
        self._client = client
        self.backends = [Backend(url.rstrip("/")) for url in urls]
        self._turn = 0
        self._change = asyncio.Event()

    def next(self) -> Backend | None:
        """The next that is up; None if none is."""
        for _ in self.backends:
            backend = self.backends[self._turn % len(self.backends)]
            self._turn += 1
            if backend.up:
                return backend
        return None

    async def wait(self) -> None:
        """Until one is up. Cancel it to give up."""
        while not any(backend.up for backend in self.backends):
            self._change.clear()
            await self._change.wait()

    def down(self, backend: Backend, why: str) -> None:
        """It has not answered, or says that it cannot: it gets nothing until it says that it is well."""
        if backend.up:
            log.warning("%s is left alone until it is ready: %s", backend.url, why)
            backend.up, backend.door = False, None
            backend.probing = asyncio.create_task(self._probe(backend), name=f"probe {backend.url}")

    async def _probe(self, backend: Backend) -> None:
        while not backend.up:
            await asyncio.sleep(PROBE_EVERY)
            try:
                answer = await self._client.get(backend.url + "/health", timeout=PROBE_TIMEOUT)
            except httpx.HTTPError:
                continue
            backend.up = answer.status_code == 200
        log.info("%s is ready", backend.url)
        backend.probing = None
        self._change.set()

    def close(self) -> None:
        for backend in self.backends:
            if backend.probing is not None:
                backend.probing.cancel()
