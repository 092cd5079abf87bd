"""Prefill engines as a decode engine knows them: one control connection each, and a circuit breaker."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ...core.errors import ConfigError, FluentError
from ...transfer.layout import LayoutMismatch, check_compatible
from ...transfer.link import Link, LinkError
from ...transfer.messages import Describe, Message, Refuse

if TYPE_CHECKING:
    from .exchange import Connection, Exchange


MAX_FORGOTTEN = 4096
"""Beyond it the oldest are left to the peer's own deadline."""


class Breaker:
    """Opens after some failures in a row; after a while it lets one try through (half open), which closes or opens it."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._seconds, self._clock = failures, seconds, clock
        self._failures = 0
        self._opened: float | None = None
        self._trying = False

    @property
    def state(self) -> Literal["closed", "open", "half open"]:
        if self._opened is None:
            return "closed"
        return "half open" if self._clock() - self._opened >= self._seconds else "open"

    def allows(self) -> bool:
        """Whether to try now. True when half open is a promise to report how it went."""
        if self.state == "half open" and not self._trying:
            self._trying = True
            return True
        return self._opened is None

    def succeeded(self) -> None:
        self._failures, self._opened, self._trying = 0, None, False

    def forgo(self) -> None:
        """Who was let through does not try after all."""
        self._trying = False

    def failed(self) -> None:
        self._failures += 1
        if self._trying or self._failures >= self._limit:
            self._opened, self._trying = self._clock(), False


class PrefillPeer:
    """Where a prefill engine listens; connected when first needed, and again when the connection was lost."""

    def __init__(self, exchange: Exchange, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.breaker = Breaker(exchange.settings.breaker_failures, exchange.settings.breaker_seconds)
        self.connection: Connection | None = None
        self.refusal: FluentError | None = None
        """Why it cannot be used: its KV does not fit ours."""
        self.forgotten: deque[str] = deque(maxlen=MAX_FORGOTTEN)
        """Handoffs that it is to be told are not wanted any more."""
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.on_ready: Callable[[PrefillPeer], None] = lambda peer: None
        self.on_failed: Callable[[PrefillPeer, FluentError], None] = lambda peer, error: None
        self.on_message: Callable[[Connection, Message], None] = lambda connection, message: None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def connect(self) -> None:
        """`on_ready` or `on_failed` follows."""
        if self.connection is None and self._task is None:
            self._task = self._exchange.loop.create_task(self._connect())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def _connect(self) -> None:
        exchange = self._exchange
        timeout = exchange.settings.connect_timeout
        try:
            link = await Link.open(self.host, self.port, exchange.key, timeout)
        except FluentError as error:
            self._fail(error)
            return
        link.listen(lambda message: self._received(link, message), lambda error: self._lost(link, error))
        self._timer = exchange.after(timeout, self._lost, link, LinkError(f"{self} does not describe itself."))
        link.send(exchange.describe())

    def _received(self, link: Link, message: Message) -> None:
        if self.connection is not None:
            self.on_message(self.connection, message)
        elif isinstance(message, Describe):
            self._described(link, message)
        elif isinstance(message, Refuse):
            self.refusal = LayoutMismatch(message.reason) if message.code == LayoutMismatch.code else None
            self._lost(link, self.refusal or LinkError(f"{self} refuses: {message.reason}"))
        else:
            self._lost(link, LinkError(f"{self} begins with a {type(message).__name__}."))

    def _described(self, link: Link, other: Describe) -> None:
        try:
            check_compatible(other.layout, self._exchange.layout)
            self.connection = self._exchange.connect(link, other)
        except FluentError as error:
            self.refusal = error if isinstance(error, LayoutMismatch) else None
            self._lost(link, error)
            return
        self._done()
        self.on_ready(self)

    def _lost(self, link: Link, error: FluentError) -> None:
        link.close()
        if self.connection is not None:
            if self.connection.link is link:
                self._exchange.end(self.connection, error)
        else:
            self._fail(error)

    def _fail(self, error: FluentError) -> None:
        self._done()
        self.breaker.failed()
        self.on_failed(self, error)

    def _done(self) -> None:
        self._task = None
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
