"""What came from the engine and was not read yet: a stream for each open request, a future for each open call.

The engine clients (`client.py`) share it: one message of the engine holds what a step brought to all requests, and is taken
apart here. Everything happens in one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Literal

from fluentllm.core.errors import FluentError, InvalidRequest
from fluentllm.core.types import ControlCall, ControlReply, FromEngine, ModelInfo, Outputs, Refused, Request, RequestOutput

if TYPE_CHECKING:
    from collections.abc import Callable


def error_of(refused: Refused) -> FluentError:
    """The typed error that the engine named by its code."""
    kinds = [FluentError]
    while kinds:
        kind = kinds.pop()
        if (kind.code, kind.status) == (refused.code, refused.status) and kind.__init__ is FluentError.__init__:
            return kind(refused.message, param=refused.param)
        kinds += kind.__subclasses__()
    error = FluentError(refused.message, param=refused.param)
    error.code, error.status = refused.code, refused.status
    return error


class Stream:
    """What has come for one request and was not read yet. One reader, in the loop that `put` is called in."""

    __slots__ = ("_waiter", "items")

    def __init__(self) -> None:
        self.items: list[RequestOutput | FluentError] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: RequestOutput | FluentError) -> None:
        self.items.append(item)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def arrival(self) -> asyncio.Future[None]:
        """Done as soon as there is something to take."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        return waiter

    def take(self) -> list[RequestOutput | FluentError]:
        """Everything that came since the last time."""
        items, self.items = self.items, []
        return items


class Inbox:
    """Open requests and calls of one client, by id; routes the engine's messages to them."""

    def __init__(self) -> None:
        self.info: ModelInfo | None = None
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, asyncio.Future[ControlReply]] = {}
        self._numbers = itertools.count(1)

    def open(self, request: Request) -> Stream:
        if request.id in self._streams:
            raise InvalidRequest(f"A request with id {request.id!r} is running already.", fix="Give each request its own id.")
        stream = self._streams[request.id] = Stream()
        return stream

    def drop(self, request_id: str) -> bool:
        """Whether it was open."""
        return self._streams.pop(request_id, None) is not None

    def receive(self, message: FromEngine) -> None:
        streams = self._streams
        if type(message) is Outputs:
            for output in message.outputs:
                stream = streams.get(output.id)  # None: it was aborted while this was on its way
                if stream is not None:
                    stream.put(output)
        elif type(message) is Refused:
            stream = streams.get(message.id)
            if stream is not None:
                stream.put(error_of(message))
        elif type(message) is ControlReply:
            call = self._calls.get(message.id)
            if call is not None and not call.done():
                call.set_result(message)

    def fail(self, make: Callable[[], FluentError]) -> None:
        """End everything that is open with an error of its own."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(make())
        for call in self._calls.values():
            if not call.done():
                call.set_exception(make())

    async def call(
        self,
        method: Literal["stats", "clear_cache", "plugin"],
        send: Callable[[ControlCall], None],
        name: str = "",
        data: bytes = b"",
    ) -> ControlReply:
        number = next(self._numbers)
        reply: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._calls[number] = reply
        try:
            send(ControlCall(id=number, method=method, name=name, data=data))
            return await reply
        finally:
            del self._calls[number]
