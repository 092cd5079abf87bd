"""HTTP answers: errors in OpenAI's format, bodies encoded by msgspec, server-sent events written straight to ASGI.

The routes of any plugin may use these. A route that works for a client runs under `unless_left`, so that a client that
goes away ends the work; `EventStream` does so by itself.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from starlette.responses import Response

from ..core.errors import FluentError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping

    from starlette.types import Receive, Scope, Send

log = logging.getLogger("fluentllm.frontend")
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
DIRECT_SEND = "fluentllm.send"
"""Key of the scope: the server's own `send`, without what the framework wraps around it. Only for the body of an answer
whose start went through the wrapped one."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(message: str, *, status: int, code: str | None, param: str | None = None) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_response(
    message: str, *, status: int, code: str | None, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    body = error_body(message, status=status, code=code, param=param)
    return Response(body, status, headers, media_type="application/json")


def fluent_error_response(error: FluentError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return error_response(str(error), status=error.status, code=error.code, param=error.param, headers=headers)


def json_response(value: Any, status: int = 200) -> Response:
    """`value`: a Struct, or anything else that msgspec encodes."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class ClientLeft(Exception):
    """The client closed its connection before it had its answer."""


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects; then raises `ClientLeft`.

    The request's body must have been read. Both tasks have ended when this returns or raises.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True, slots=True)
class Events(Generic[T]):
    """What an `EventStream` sends: the items as they come, each as `encode` writes it (nothing if it gives b""), then `end`."""

    items: AsyncGenerator[T, None]
    encode: Callable[[T], bytes]
    end: Callable[[], bytes]


class EventStream(Generic[T]):
    """A response of server-sent events. `prepare` makes them; what it or the first item raises gets a status of its own,
    later errors are sent as an event, since the status is out."""

    HEADERS = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )

    def __init__(self, prepare: Callable[[], Coroutine[Any, Any, Events[T]]]) -> None:
        self.prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._send(send, scope.get(DIRECT_SEND, send)))
        except ClientLeft:
            log.debug("client left %s", scope["path"])

    async def _send(self, send: Send, send_body: Send) -> None:
        events = await self.prepare()
        encode = events.encode
        started = False
        async with aclosing(events.items) as items:
            try:
                async for item in items:
                    piece = encode(item)
                    if piece:
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": 200, "headers": list(self.HEADERS)})
                        await send_body({"type": "http.response.body", "body": piece, "more_body": True})
                last = events.end()
            except Exception as error:
                if not started:
                    raise
                last = _error_event(error)
        if not started:
            await send({"type": "http.response.start", "status": 200, "headers": list(self.HEADERS)})
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _error_event(error: Exception) -> bytes:
    if isinstance(error, FluentError):
        body = error_body(str(error), status=error.status, code=error.code, param=error.param)
    else:
        log.error("a stream broke", exc_info=error)
        body = error_body("Internal error.", status=500, code=FluentError.code)
    return b"data: " + body + b"\n\n" + DONE
