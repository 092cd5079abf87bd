"""`fluent proxy`: a small router in front of prefill and decode engines, to try them by hand.

Each completion goes to one prefill and one decode engine at once, with a room of its own, or first to the one and then to the
other (`--pull`); the decode engine's answer is the client's. Engines take turns; there is no routing by load or prefix.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ...core.errors import FluentError

if TYPE_CHECKING:
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("fluentllm.proxy")

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
WHOLE = {"stream": False, "stream_options": None}
RETRIED = frozenset({502, 503})
"""Statuses of engines that start, stop, or have died."""
ATTEMPTS = 24
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 3.0
"""Seconds before asking again; each time twice as long. In all a minute: engines take a while to start."""
HOP_HEADERS = frozenset({"content-length", "transfer-encoding", "connection", "date", "server"})


class NoDoor(FluentError):
    """A prefill engine that does not say where it takes control connections."""

    status, code = 502, "prefill_unusable"


class Proxy:
    """Forwards requests; used in one event loop."""

    def __init__(self, client: httpx.AsyncClient, prefill: Sequence[str], decode: Sequence[str], *, pull: bool) -> None:
        """client: sends the engines' key with every request."""
        self._client = client
        self._prefill = itertools.cycle([url.rstrip("/") for url in prefill])
        self._decode = itertools.cycle([url.rstrip("/") for url in decode])
        self._pull = pull
        self._doors: dict[str, tuple[str, int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def complete(self, request: Request) -> Response:
        """An answer that has not begun when an engine fails is asked for again, of the next ones."""
        from httpx import HTTPError

        body = msgspec.json.decode(await request.body())
        path = request.url.path
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                answer = await (self._pull_once(path, body) if self._pull else self._push_once(path, body))
            except (HTTPError, NoDoor):
                if last:
                    raise
            else:
                if answer.status_code not in RETRIED or last:
                    return await self._stream(answer)
                await answer.aclose()
            await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt))
        raise AssertionError("the last attempt answers or raises")

    async def _push_once(self, path: str, body: dict[str, Any]) -> httpx.Response:
        prefill, decode = next(self._prefill), next(self._decode)
        host, port = await self._door(prefill)
        extra = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": secrets.randbits(62)}
        task = asyncio.create_task(self._send_prefill(prefill + path, {**body, **extra, **WHOLE}))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await self._open(decode + path, {**body, **extra})

    async def _pull_once(self, path: str, body: dict[str, Any]) -> httpx.Response:
        prefill, decode = next(self._prefill), next(self._decode)
        answer = await self._open(prefill + path, {**body, **WHOLE, "kv_transfer_params": {"do_remote_decode": True}})
        if answer.status_code != 200:
            return answer
        await answer.aread()
        return await self._open(decode + path, {**body, "kv_transfer_params": answer.json()["kv_transfer_params"]})

    async def forward(self, request: Request) -> Response:
        """Everything else is the same on all engines: the next decode engine answers."""
        url = next(self._decode) + request.url.path
        return self._answer(await self._client.request(request.method, url, content=await request.body()))

    async def _open(self, url: str, body: dict[str, Any]) -> httpx.Response:
        """An answer whose body is still to come."""
        return await self._client.send(self._client.build_request("POST", url, json=body), stream=True)

    async def _stream(self, answer: httpx.Response) -> Response:
        from starlette.responses import StreamingResponse

        async def chunks() -> AsyncIterator[bytes]:
            # Also where the client leaves: closing the answer tells the engine.
            try:
                if answer.is_stream_consumed:
                    yield answer.content
                else:
                    async for chunk in answer.aiter_raw():
                        yield chunk
            finally:
                await answer.aclose()

        return StreamingResponse(chunks(), answer.status_code, headers=_headers(answer))

    async def _send_prefill(self, url: str, body: dict[str, Any]) -> None:
        """Nobody reads the answer; the decode engine notices a failure by itself."""
        try:
            answer = await self._client.post(url, json=body)
            if answer.status_code != 200:
                log.warning("%s: %d %s", url, answer.status_code, answer.text[:300])
        except Exception as error:
            log.warning("%s: %s", url, error or type(error).__name__)

    async def _door(self, url: str) -> tuple[str, int]:
        if url not in self._doors:
            answer = (await self._client.get(url + "/handoff")).json()
            if answer.get("role") != "prefill":
                raise NoDoor(f"{url} is no prefill engine.", fix="Start it with --role prefill.")
            self._doors[url] = answer["host"], answer["port"]
        return self._doors[url]

    @staticmethod
    def _answer(answer: httpx.Response) -> Response:
        from starlette.responses import Response

        return Response(answer.content, answer.status_code, headers=_headers(answer))


def _headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in HOP_HEADERS}


def create_app(prefill: Sequence[str], decode: Sequence[str], *, api_key: str | None, pull: bool) -> Starlette:
    import httpx
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None, connect=5), limits=limits)
    proxy = Proxy(client, prefill, decode, pull=pull)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def broken(request: Request, error: Exception) -> Response:
        text = f"An engine cannot be reached: {error or type(error).__name__}."
        return JSONResponse({"error": {"message": text, "type": "server_error", "param": None, "code": "bad_gateway"}}, 502)

    routes = [Route(path, proxy.complete, methods=["POST"]) for path in COMPLETIONS]
    routes.append(Route("/{path:path}", proxy.forward, methods=["GET", "POST"]))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={httpx.HTTPError: broken, NoDoor: broken})


def proxy_command(
    prefill: Annotated[list[str], typer.Option(help="URL of a prefill engine; may be given several times.")],
    decode: Annotated[list[str], typer.Option(help="URL of a decode engine; may be given several times.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[str | None, typer.Option(help="The engines' server.api_key.", envvar="FLUENT_SERVER__API_KEY")] = None,
    pull: Annotated[bool, typer.Option("--pull", help="Prefill first, then decode, instead of both at once.")] = False,
) -> None:
    """Route completions to prefill and decode engines, one of each a request. For trying it by hand: whoever reaches it needs
    no key of their own."""
    import uvicorn

    uvicorn.run(create_app(prefill, decode, api_key=api_key, pull=pull), host=host, port=port, log_level="info")
