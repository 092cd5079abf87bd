"""Prefill engines as a decode engine knows them: a control connection to each of their ranks that writes here, and a breaker.

Ranks of one engine take control connections at ports that follow each other, the first at the one that is configured.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...core.errors import ConfigError, FluentError
from ...transfer.layout import LayoutMismatch, check_compatible
from ...transfer.link import Link, LinkError
from ...transfer.messages import Describe, Message, Refuse
from ...transfer.slices import sources_of
from .breaker import Breaker

if TYPE_CHECKING:
    from .exchange import Connection, Exchange


MAX_FORGOTTEN = 4096
"""Beyond it the oldest are left to the peer's own deadline."""


class PrefillPeer:
    """Where a prefill engine listens; connected when first needed, and again when a connection was lost."""

    def __init__(self, exchange: Exchange, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.breaker = Breaker(exchange.settings.breaker_failures, exchange.settings.breaker_seconds)
        self.connections: dict[int, Connection] = {}
        """By rank."""
        self.ready = False
        """All that are needed stand."""
        self.refusal: FluentError | None = None
        """Why it cannot be used: its KV does not fit ours."""
        self.forgotten: deque[str] = deque(maxlen=MAX_FORGOTTEN)
        """Handoffs that it is to be told are not wanted any more."""
        self._exchange = exchange
        self._wanted = {0}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._links: dict[int, Link] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.on_ready: Callable[[PrefillPeer], None] = lambda peer: None
        self.on_failed: Callable[[PrefillPeer, FluentError], None] = lambda peer, error: None
        self.on_message: Callable[[Connection, Message], None] = lambda connection, message: None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def writers(self) -> list[Connection]:
        """To the ranks that write here, when ready."""
        return [self.connections[rank] for rank in sources_of(self.connections[0].layout, self._exchange.layout)]

    def connect(self) -> None:
        """`on_ready` or `on_failed` follows."""
        if not self.ready and not self._tasks:
            self._wanted = {0}
            exchange = self._exchange
            late = LinkError(f"{self} does not describe itself.")
            self._timer = exchange.after(2 * exchange.settings.connect_timeout, self._fail, late)
            self._reach(0)

    def lost(self, error: FluentError) -> None:
        """One of its connections is gone: all of it is."""
        if not self.ready:
            self._fail(error)
            return
        self.breaker.failed()
        self._drop(error)

    def _drop(self, error: FluentError) -> None:
        connections, self.connections, self.ready = list(self.connections.values()), {}, False
        self._links.clear()
        for connection in connections:
            self._exchange.end(connection, error)

    def close(self) -> None:
        self._done()
        for task in self._tasks.values():
            task.cancel()

    def _reach(self, rank: int) -> None:
        self._tasks[rank] = self._exchange.loop.create_task(self._connect(rank))

    async def _connect(self, rank: int) -> None:
        exchange = self._exchange
        try:
            link = await Link.open(self.host, self.port + rank, exchange.key, exchange.settings.connect_timeout)
        except FluentError as error:
            self._fail(error)
            return
        self._links[rank] = link
        link.listen(lambda message: self._received(rank, link, message), lambda error: self._lost(rank, link, error))
        link.send(exchange.describe())

    def _received(self, rank: int, link: Link, message: Message) -> None:
        if rank in self.connections:
            self.on_message(self.connections[rank], message)
        elif isinstance(message, Describe):
            self._described(rank, link, message)
        elif isinstance(message, Refuse):
            self.refusal = LayoutMismatch(message.reason) if message.code == LayoutMismatch.code else None
            self._fail(self.refusal or LinkError(f"{self} refuses: {message.reason}"))
        else:
            self._fail(LinkError(f"{self} begins with a {type(message).__name__}."))

    def _described(self, rank: int, link: Link, other: Describe) -> None:
        exchange = self._exchange
        try:
            check_compatible(other.layout, exchange.layout)
            if other.layout.tp_rank != rank:
                raise LinkError(f"Rank {other.layout.tp_rank} answers at {self.host}:{self.port + rank}, not rank {rank}.")
            self.connections[rank] = exchange.connect(link, other)
        except FluentError as error:
            self.refusal = error if isinstance(error, LayoutMismatch) else None
            self._fail(error)
            return
        if rank == 0:
            self._wanted |= set(sources_of(other.layout, exchange.layout))
            for further in self._wanted - {0}:
                self._reach(further)
        if self.connections.keys() == self._wanted:
            self._done()
            self.ready = True
            self.on_ready(self)

    def _lost(self, rank: int, link: Link, error: FluentError) -> None:
        connection = self.connections.get(rank)
        if self.ready and connection is not None and connection.link is link:
            self._exchange.end(connection, error)
        elif self._links.get(rank) is link:
            self._fail(error)

    def _fail(self, error: FluentError) -> None:
        links = list(self._links.values())
        self._done()
        self._drop(error)
        for link in links:
            link.close()
        self.breaker.failed()
        self.on_failed(self, error)

    def _done(self) -> None:
        tasks, self._tasks = self._tasks, {}
        current = asyncio.current_task()
        for task in tasks.values():
            if task is not current:
                task.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def address(text: str) -> tuple[str, int]:
    """`host:port`. Raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"plugins.kv_layerwise.peers has {text!r}.",
            fix="Write each prefill engine as host:port, such as 10.0.0.5:8998.",
            param="plugins.kv_layerwise.peers",
        )
    return host.strip("[]"), int(port)
