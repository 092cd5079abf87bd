"""Pages of attempts that are over here and maybe not there: a remote writer may still write to them.

They stay leased until the writer says that it is drained. Where it does not within the deadline, or its connection is gone,
they are quarantined; then three things end it: the writer's word, late as it may come; the memory registered anew, which
revokes all writers, when nothing is being received; or, where the transport cannot revoke, the end of this engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.errors import FluentError

if TYPE_CHECKING:
    from ...core.kv.pages import Lease
    from ...transfer.messages import Attempt
    from .exchange import Connection, Exchange

log = logging.getLogger("fluentllm.handoff")


class QuarantineFull(FluentError):
    """Too many pages are in quarantine, and nothing but a restart ends it."""

    code = "quarantine_full"


@dataclass(slots=True, eq=False)
class Draining:
    of: Attempt
    connection: Connection
    lease: Lease
    timer: asyncio.TimerHandle | None = None


class Quarantine:
    """`receiving` says whether anything is being received; then the memory stays registered."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._draining: dict[Attempt, Draining] = {}
        self._leases: dict[Attempt, Lease] = {}
        """In quarantine."""
        self._task: asyncio.Task[None] | None = None
        self.receiving: Callable[[], bool] = lambda: False

    @property
    def open(self) -> int:
        """Attempts whose pages are not free yet."""
        return len(self._draining) + len(self._leases)

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

    # ------------------------------------------------------------------------------------------------------------- ends
    def drain(self, of: Attempt, connection: Connection, lease: Lease) -> None:
        """The attempt is over on this side: its pages wait for the writer's word."""
        draining = Draining(of, connection, lease)
        self._draining[of] = draining
        if connection.link.closed:
            self._not_drained(draining)
        else:
            draining.timer = self._exchange.after(self._exchange.settings.drain_timeout, self._late, draining)

    def drained(self, of: Attempt) -> bool:
        """The writer has given its word. Whether this attempt's pages were here."""
        allocator = self._exchange.host.kv.allocator
        draining, lease = self._draining.pop(of, None), self._leases.pop(of, None)
        if draining is not None:
            if draining.timer is not None:
                draining.timer.cancel()
            allocator.release(draining.lease)
        elif lease is not None:
            allocator.drained(lease)
        else:
            return False
        self.try_to_end()
        self._exchange.host.wake()
        return True

    def gone(self, connection: Connection) -> None:
        """No word will come on this connection."""
        for draining in [item for item in self._draining.values() if item.connection is connection]:
            self._not_drained(draining)

    # ------------------------------------------------------------------------------------------------------- quarantine
    def _late(self, draining: Draining) -> None:
        self._exchange.counters["deadline_drain"] += 1
        self._not_drained(draining)

    def _not_drained(self, draining: Draining) -> None:
        if draining.timer is not None:
            draining.timer.cancel()
        self._draining.pop(draining.of, None)
        self._exchange.counters["quarantined"] += 1
        self._exchange.host.kv.allocator.quarantine(draining.lease)
        self._leases[draining.of] = draining.lease
        if self.pages >= self._limit and not self._exchange.transport.revokes:
            self._exchange.host.fail(
                QuarantineFull(
                    f"{self.pages} of {self._exchange.host.kv.pages_total} pages are in quarantine, and the transport cannot "
                    "revoke the memory that peers may still write to.",
                    fix="The engine restarts; see why transfers fail, or raise plugins.kv_layerwise.quarantine.",
                )
            )
        self.try_to_end()
        self._exchange.host.wake()

    def try_to_end(self) -> None:
        """Something has changed: register the memory anew if there is a reason, and nothing is in the way."""
        wanted = bool(self._leases) and self._exchange.transport.revokes
        if wanted and self._task is None and not self._draining and not self.receiving():
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
