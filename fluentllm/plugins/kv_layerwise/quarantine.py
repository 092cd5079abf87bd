"""Pages that a remote writer may still write to, though nobody waits for it: out of use until it is drained for certain.

Three things end a quarantine: the writer's word, late as it may come; the memory registered anew, which revokes all writers,
when nothing is being received; or, where the transport cannot revoke, the end of this engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...core.errors import FluentError

if TYPE_CHECKING:
    from ...core.kv.pages import Lease
    from ...transfer.messages import Attempt
    from .exchange import Exchange

log = logging.getLogger("fluentllm.handoff")


class QuarantineFull(FluentError):
    """Too many pages are in quarantine, and nothing but a restart ends it."""

    code = "quarantine_full"


class Quarantine:
    """`busy` says whether anything is being received; then the memory stays registered."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._leases: dict[Attempt, Lease] = {}
        self._task: asyncio.Task[None] | None = None
        self.busy: Callable[[], bool] = lambda: False

    @property
    def leases(self) -> int:
        return len(self._leases)

    @property
    def pages(self) -> int:
        return self._exchange.host.kv.allocator.quarantined

    @property
    def full(self) -> bool:
        """So many pages, or the memory is being registered just now, that nothing more may be asked for."""
        return self._task is not None or (bool(self._leases) and self.pages >= self._limit)

    @property
    def _limit(self) -> int:
        return max(1, int(self._exchange.settings.quarantine * self._exchange.host.kv.pages_total))

    def add(self, of: Attempt, lease: Lease) -> None:
        self._exchange.counters["quarantined"] += 1
        self._exchange.host.kv.allocator.quarantine(lease)
        self._leases[of] = lease
        if self.pages >= self._limit and not self._exchange.transport.revokes:
            self._exchange.host.fail(
                QuarantineFull(
                    f"{self.pages} of {self._exchange.host.kv.pages_total} pages are in quarantine, and the transport cannot "
                    "revoke the memory that peers may still write to.",
                    fix="The engine restarts; see why transfers fail, or raise plugins.kv_layerwise.quarantine.",
                )
            )

    def drained(self, of: Attempt) -> bool:
        """The writer has given its word. Whether these pages were here."""
        lease = self._leases.pop(of, None)
        if lease is None:
            return False
        self._exchange.host.kv.allocator.drained(lease)
        self._exchange.host.wake()
        return True

    def try_to_end(self) -> None:
        """Something has changed: register the memory anew if there is a reason, and nothing is in the way."""
        if self._leases and self._task is None and self._exchange.transport.revokes and not self.busy():
            self._task = self._exchange.loop.create_task(self._register())

    async def _register(self) -> None:
        try:
            await self._exchange.register_again()
        except Exception as error:
            self._exchange.host.fail(error)
            return
        finally:
            self._task = None
        for lease in self._leases.values():
            self._exchange.host.kv.allocator.drained(lease)
        self._leases.clear()
        self._exchange.host.wake()
