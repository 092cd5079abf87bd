"""A small router in front of prefill and decode engines: what `fluent proxy` runs.

Each completion goes to one prefill and one decode engine at once, with a room of its own, or first to the one and then to the
other (`--pull`); the decode engine's answer is the client's. Engines take turns; there is no routing by load or prefix.

A request has one deadline, which all that is tried for it draws from. While no decode engine is up it waits for one; while no
prefill engine is, decode engines compute prompts themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ...core.errors import FluentError, InvalidRequest
from ...frontend.responses import ClientLeft, error_response, fluent_error_response, unless_left
from .fleet import Fleet
from .proxy import QUEUE, TIMEOUT

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from .fleet import Backend

log = logging.getLogger("fluentllm.proxy")

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
WHOLE = {"stream": False, "stream_options": None}
AWAY = frozenset({502, 503})
"""Statuses of engines that start, stop, or have died."""
HOP_HEADERS = frozenset({"content-length", "transfer-encoding", "connection", "date", "server"})


class NoDoor(FluentError):
    """A prefill engine that is none."""

    status, code = 502, "prefill_unusable"


class TooMany(FluentError):
    """No decode engine is up, and as many requests as may wait for one."""

    status, code = 503, "proxy_queue_full"


class TooLate(FluentError):
    """The request's deadline has passed."""

    status, code = 504, "proxy_timeout"


class Failed(Exception):
    """One attempt; another may do better."""


class Proxy:
    """Forwards requests; used in one event loop."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        prefill: Sequence[str],
        decode: Sequence[str],
        *,
        pull: bool,
        timeout: float = TIMEOUT,
        queue: int = QUEUE,
    ) -> None:
        """client: sends the engines' key with every request. timeout: seconds until an answer must have begun. queue: requests
        that may wait for a decode engine."""
        self._client = client
        self._prefill, self._decode = Fleet(client, prefill), Fleet(client, decode)
        self._pull, self._timeout, self._queue = pull, timeout, queue
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()

    async def complete(self, request: Request) -> Response:
        """An answer that has not begun when an engine fails is asked for again, of the next ones. Raises `TooMany`, `TooLate`,
        `NoDoor`."""
        try:
            body = msgspec.json.decode(await request.body(), type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body is no JSON object: {error}.") from error
        return Relay(await unless_left(request.receive, self._in_time(request.url.path, body)))

    async def _in_time(self, path: str, body: dict[str, Any]) -> httpx.Response:
        failures: list[str] = []
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    decode = self._decode.next() or await self._await_decode()
                    try:
                        return await self._attempt(decode, path, body)
                    except Failed as failure:
                        failures.append(str(failure))
        except TimeoutError as error:
            last = f"; the last of {len(failures)} failures: {failures[-1]}" if failures else ""
            raise TooLate(f"No answer within {self._timeout:g} s{last}.", fix="See the engines' logs.") from error

    async def _await_decode(self) -> Backend:
        if self._waiting >= self._queue:
            raise TooMany(
                f"No decode engine is up, and {self._waiting} requests wait for one.", fix="Try again in some seconds."
            )
        self._waiting += 1
        try:
            while True:
                await self._decode.wait()
                if backend := self._decode.next():
                    return backend
        finally:
            self._waiting -= 1

    async def _attempt(self, decode: Backend, path: str, body: dict[str, Any]) -> httpx.Response:
        """Raises `Failed`, `NoDoor`."""
        prefill = self._prefill.next()
        if prefill is None:  # decode engines answer ordinary requests too
            return await self._open(self._decode, decode, path, body)
        if self._pull:
            return await self._pull_once(prefill, decode, path, body)
        return await self._push_once(prefill, decode, path, body)

    async def _push_once(self, prefill: Backend, decode: Backend, path: str, body: dict[str, Any]) -> httpx.Response:
        host, port = await self._door(prefill)
        extra = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": secrets.randbits(62)}
        # Nobody reads its answer, and it goes on where the client leaves: decode then tells the engine so itself.
        half = asyncio.create_task(self._send_prefill(prefill, path, {**body, **extra, **WHOLE}))
        self._tasks.add(half)
        half.add_done_callback(self._tasks.discard)
        return await self._open(self._decode, decode, path, {**body, **extra})

    async def _pull_once(self, prefill: Backend, decode: Backend, path: str, body: dict[str, Any]) -> httpx.Response:
        kept = {**body, **WHOLE, "kv_transfer_params": {"do_remote_decode": True}}
        answer = await self._open(self._prefill, prefill, path, kept)
        if answer.status_code != 200:
            return answer
        try:
            params = msgspec.json.decode(await answer.aread())["kv_transfer_params"]
        finally:
            await answer.aclose()
        return await self._open(self._decode, decode, path, {**body, "kv_transfer_params": params})

    async def forward(self, request: Request) -> Response:
        """Everything else is the same on all engines: the next decode engine answers."""
        backend = self._decode.next() or self._decode.backends[0]
        url = backend.url + request.url.path
        answer = await self._client.request(request.method, url, content=await request.body())
        return Response(answer.content, answer.status_code, headers=_headers(answer))

    async def _open(self, fleet: Fleet, backend: Backend, path: str, body: dict[str, Any]) -> httpx.Response:
        """An answer whose body is still to come. Raises `Failed`."""
        try:
            answer = await self._post(backend.url + path, body)
            if answer.status_code not in AWAY:
                return answer
            said = await _read(answer)
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
        fleet.down(backend, said)
        raise Failed(f"{backend.url}: {said}")

    async def _post(self, url: str, body: dict[str, Any]) -> httpx.Response:
        """Raises `httpx.HTTPError`."""
        try:
            return await self._client.send(self._client.build_request("POST", url, json=body), stream=True)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            # A connection that was kept open may be closed at the moment when it is used again: that says nothing of the
            # engine, and decode would wait for a prompt that nobody has.
            return await self._client.send(self._client.build_request("POST", url, json=body), stream=True)

    async def _send_prefill(self, backend: Backend, path: str, body: dict[str, Any]) -> None:
        """The decode engine notices a failure by itself."""
        try:
            answer = await self._open(self._prefill, backend, path, body)
        except Failed:
            return
        said = await _read(answer)
        if answer.status_code != 200:
            log.warning("%s: %d %s", backend.url, answer.status_code, said[:300])

    async def _door(self, backend: Backend) -> tuple[str, int]:
        """Raises `Failed`, `NoDoor`."""
        if backend.door is None:
            try:
                answer = await self._client.get(backend.url + "/handoff", timeout=self._timeout)
            except httpx.HTTPError as error:
                self._prefill.down(backend, str(error) or type(error).__name__)
                raise Failed(f"{backend.url}: {error}") from error
            if answer.status_code != 200:
                self._prefill.down(backend, answer.text)
                raise Failed(f"{backend.url}: {answer.text}")
            told = answer.json()
            if told["role"] != "prefill":
                raise NoDoor(f"{backend.url} is no prefill engine.", fix="Start it with --role prefill.")
            backend.door = told["host"], told["port"]
        return backend.door


class Relay(Response):
    """An engine's answer as it comes, as an ASGI response. Closing it tells the engine where the client leaves."""

    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        try:
            response = StreamingResponse(answer.aiter_raw(), answer.status_code, headers=_headers(answer))
            await response(scope, receive, send)
        finally:
            await answer.aclose()


async def _read(answer: httpx.Response) -> str:
    try:
        await answer.aread()
        return answer.text
    finally:
        await answer.aclose()


def _headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in HOP_HEADERS}


def create_app(
    prefill: Sequence[str],
    decode: Sequence[str],
    *,
    api_key: str | None,
    pull: bool,
    timeout: float = TIMEOUT,
    queue: int = QUEUE,
) -> Starlette:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    # Our front ends keep an idle connection for 5 s: it is let go of before they do.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0)
    client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None, connect=5), limits=limits)
    proxy = Proxy(client, prefill, decode, pull=pull, timeout=timeout, queue=queue)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            with contextlib.closing(proxy):
                yield

    async def broken(request: Request, error: Exception) -> Response:
        text = f"An engine cannot be reached: {error or type(error).__name__}."
        return error_response(text, status=502, code="bad_gateway")

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # to nobody

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, FluentError)
        return fluent_error_response(error)

    routes = [Route(path, proxy.complete, methods=["POST"]) for path in COMPLETIONS]
    routes.append(Route("/{path:path}", proxy.forward, methods=["GET", "POST"]))
    handlers: dict[Any, Any] = {httpx.HTTPError: broken, FluentError: refused, ClientLeft: left, ClientDisconnect: left}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
