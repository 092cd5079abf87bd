"""The front end's view of the engine: submit a request, read what each step brings it.

Two clients with one face: `SocketEngineClient` speaks to the engine process, `LocalEngineClient` to an engine in this
process, on this thread's event loop or another's. One message of the engine carries what a step brought to all requests;
it is decoded once and handed to each request's stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fluentllm.core import ipc
from fluentllm.core.errors import EngineDied, EngineUnavailable, FluentError, PluginError
from fluentllm.core.session import Session
from fluentllm.core.types import (
    Abort,
    EngineStats,
    FromEngine,
    Generate,
    ModelInfo,
    Ready,
    Request,
    RequestOutput,
    ToEngine,
)

from .inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from fluentllm.core.session import Engine

EngineState = Literal["starting", "ready", "restarting", "failed"]
RECONNECT_DELAYS = (0.02, 0.05, 0.1, 0.2)
"""Seconds between attempts to reach an engine that does not listen; the last one repeats."""


class EngineClient(Protocol):
    """What the rest of the front end knows of the engine."""

    @property
    def info(self) -> ModelInfo | None:
        """The model that is served; kept while the engine restarts, None before it was first ready."""
        ...

    @property
    def state(self) -> EngineState: ...

    def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """What each step brings the request, until an output with a finish reason. Leaving early aborts the request:
        close the generator (`contextlib.aclosing`). Raises what the engine refused it with, `EngineUnavailable` while
        there is none, `EngineDied` if it ends meanwhile."""
        ...

    def complete(self, request_id: str) -> None:
        """Its reader has all of the text and leaves: the request ends as `stop`, not as `abort`. Unknown ids are ignored."""
        ...

    async def stats(self) -> EngineStats:
        """Raises `EngineUnavailable`."""
        ...

    async def clear_cache(self) -> None:
        """Forget all prefixes. Raises `EngineUnavailable`."""
        ...

    async def call(self, name: str, data: bytes = b"") -> bytes:
        """Make a call that a plugin of the engine registered by `fluent_calls`. Raises `EngineUnavailable`, and `PluginError`
        if there is no such call or it raised."""
        ...


class _Client(ABC):
    """What both clients share: a request is a stream of the inbox, filled by `receive`, read by the generator."""

    def __init__(self) -> None:
        self._inbox = Inbox()

    @property
    def info(self) -> ModelInfo | None:
        return self._inbox.info

    async def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self._check()
        stream = self._inbox.open(request)
        running = False
        try:
            self._send(Generate(request=request))
            running = True
            while True:
                if not stream.items:
                    await stream.arrival()
                for item in stream.take():
                    if isinstance(item, FluentError):
                        running = False
                        raise item
                    running = item.finish_reason is None
                    yield item
                    if not running:
                        return
        finally:
            if self._inbox.drop(request.id) and running:
                self._send(Abort(ids=[request.id]))

    def complete(self, request_id: str) -> None:
        if self._inbox.drop(request_id):
            self._send(Abort(ids=[request_id], reason="stop"))

    async def stats(self) -> EngineStats:
        self._check()
        reply = await self._inbox.call("stats", self._send)
        assert reply.stats is not None
        return reply.stats

    async def clear_cache(self) -> None:
        self._check()
        await self._inbox.call("clear_cache", self._send)

    async def call(self, name: str, data: bytes = b"") -> bytes:
        self._check()
        reply = await self._inbox.call("plugin", self._send, name, data)
        if reply.error is not None:
            raise PluginError(reply.error)
        return reply.data

    @abstractmethod
    def _check(self) -> None:
        """Raises `EngineUnavailable` while there is no engine."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Bring a message to the engine; one that is gone meanwhile needs none."""


class SocketEngineClient(_Client):
    """The engine behind a Unix socket. `start` keeps connecting until `close`; an engine that went away is awaited."""

    def __init__(self, path: Path, **limits: Any) -> None:
        """`limits` are those of `ipc.Connection`."""
        super().__init__()
        self._path = path
        self._limits = limits
        self._link: ipc.Connection[FromEngine] | None = None
        self._generation = 0
        self._told: EngineState | None = None
        self._ready = asyncio.Event()
        self._news = asyncio.Event()
        self._given_up: Callable[[], FluentError] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> EngineState:
        """Ready is what the connection says; what an engine out of reach is doing, the supervisor tells."""
        if self._ready.is_set():
            return "ready"
        if self._told is not None and self._told != "ready":
            return self._told
        return "starting" if self.info is None else "restarting"

    async def start(self) -> None:
        """Begin to connect, in the background."""
        self._task = asyncio.create_task(self._stay_connected(), name="engine client")

    async def wait_ready(self) -> ModelInfo:
        await self._ready.wait()
        assert self.info is not None
        return self.info

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._link is not None:
            self._link.close()

    def told(self, state: EngineState) -> None:
        """The supervisor says what the engine is doing."""
        self._told = state
        self._news.set()

    def give_up(self, make: Callable[[], FluentError]) -> None:
        """End what is open, and refuse what comes, each with an error of its own."""
        self._given_up = make
        self._inbox.fail(make)

    def _check(self) -> None:
        if self._given_up is not None:
            raise self._given_up()
        if not self._ready.is_set():
            raise EngineUnavailable(f"The engine is {self.state}.", fix="Try again in a moment; /health says when it is ready.")

    def _send(self, message: ToEngine) -> None:
        if self._link is not None:
            self._link.send(message)

    async def _stay_connected(self) -> None:
        attempt = 0
        while True:
            link = _Link(self)
            try:
                await ipc.connect(self._path, link.accept, oldest=self._generation, **self._limits)
            except OSError:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), RECONNECT_DELAYS[min(attempt, len(RECONNECT_DELAYS) - 1)])
                attempt += 1
            else:
                attempt = 0
                await link.ended.wait()

    def _connected(self, connection: ipc.Connection[FromEngine], info: ModelInfo) -> None:
        assert connection.generation is not None
        self._link, self._generation = connection, connection.generation
        self._inbox.info = info
        self._told = None
        self._ready.set()

    def _disconnected(self, reason: str) -> None:
        self._link = None
        self._ready.clear()
        self._inbox.fail(lambda: EngineDied(f"The engine went away while the request ran: {reason}.", fix="Send it again."))


class _Link:
    """One connection of a `SocketEngineClient`, from its first message to its end."""

    def __init__(self, client: SocketEngineClient) -> None:
        self.ended = asyncio.Event()
        self._client = client
        self._connection: ipc.Connection[FromEngine] | None = None

    def accept(self, connection: ipc.Connection[FromEngine]) -> _Link:
        self._connection = connection
        return self

    def received(self, message: FromEngine) -> None:
        if type(message) is Ready:
            assert self._connection is not None
            self._client._connected(self._connection, message.info)
        else:
            self._client._inbox.receive(message)

    def lost(self, reason: str) -> None:
        self._client._disconnected(reason)
        self.ended.set()


class LocalEngineClient(_Client):
    """An engine in this process. Its loop may run on another thread; the two then meet by `call_soon_threadsafe`.

    Bound to the running loop, in which it is made and used. Whoever runs the engine calls `stopped` when `run()` ended.
    """

    def __init__(self, engine: Engine, engine_loop: asyncio.AbstractEventLoop | None = None) -> None:
        """`engine_loop`: the loop of `engine.run()`; None is the running one."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._engine_loop = engine_loop or self._loop
        self._inbox.info = engine.info
        self._over = False
        self._session: Session | None = None
        if self._engine_loop is self._loop:
            self._session = Session(engine, self._inbox.receive)
        else:
            self._engine_loop.call_soon_threadsafe(self._open, engine)

    @property
    def state(self) -> EngineState:
        return "failed" if self._over else "ready"

    def close(self) -> None:
        """Abort everything."""
        self._there(self._close)

    def stopped(self, reason: str = "it was stopped") -> None:
        """The engine runs no more: end what is open. From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopped, reason)

    def _stopped(self, reason: str) -> None:
        self._over = True
        self._inbox.fail(lambda: EngineDied(f"The engine ended while the request ran: {reason}."))

    def _check(self) -> None:
        if self._over:
            raise EngineUnavailable("The engine has ended.", fix="Make a new one.")

    def _send(self, message: ToEngine) -> None:
        self._there(self._received, message)

    def _there(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run in the engine's loop."""
        if self._engine_loop is self._loop:
            call(*arguments)
        elif not self._engine_loop.is_closed():
            self._engine_loop.call_soon_threadsafe(call, *arguments)

    # In the engine's loop:
    def _open(self, engine: Engine) -> None:
        self._session = Session(engine, self._deliver)

    def _deliver(self, message: FromEngine) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._inbox.receive, message)

    def _received(self, message: ToEngine) -> None:
        assert self._session is not None
        self._session.received(message)

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
