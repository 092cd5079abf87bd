"""The front end's ASGI application: routes that plugins gave, behind one gate, with one error format.

The gate is plain ASGI: it checks the key and bounds the body, and never stands between a stream and its client.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from ..core.errors import BodyTooLarge, BodyTooSlow, FluentError
from ..core.plugins.routes import specific_first
from .responses import DIRECT_SEND, ClientLeft, error_response, fluent_error_response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ..core.plugins.routes import Route
    from ..core.settings import ServerSettings
    from .services import Services

log = logging.getLogger("fluentllm.frontend")

OPEN_PATHS = frozenset({"/health", "/live"})
"""Asked by load balancers, which have no key; they tell nothing about anybody."""


def create_app(services: Services, routes: Iterable[Route]) -> ASGIApp:
    """`routes` as `PluginManager.routes()` gives them."""
    given = specific_first(routes)
    starlette = Starlette(
        routes=[StarletteRoute(r.path, _counted(r, services), methods=list(r.methods), name=r.path) for r in given],
        exception_handlers={
            FluentError: _on_fluent_error,
            HTTPException: _on_http_exception,
            ClientLeft: _on_client_left,
            Exception: _on_bug,
        },
    )
    starlette.router.redirect_slashes = False
    starlette.state.fluent = services
    starlette.state.routes = given
    return Gate(starlette, services.settings.server)


def _counted(route: Route, services: Services) -> Callable[[Request], Awaitable[Any]]:
    """The route's endpoint, its calls counted for its plugin. What it refuses is an answer; anything else that it raises is
    its failure."""
    stats, endpoint = services.ledger.account(route.plugin, route.path), route.endpoint

    async def counted(request: Request) -> Any:
        started = time.monotonic()
        try:
            answer = await endpoint(request)
            if not callable(answer):
                raise TypeError(f"{route.source} answered {route.path} with {type(answer).__name__}, which is no response")
            return answer
        except (FluentError, HTTPException, ClientLeft):
            raise
        except ClientDisconnect:  # while the body was read
            raise ClientLeft from None
        except Exception:
            stats.failures += 1
            raise
        finally:
            seconds = time.monotonic() - started
            stats.calls += 1
            stats.seconds += seconds
            stats.longest = max(stats.longest, seconds)

    return counted


class Gate:
    """Refuses requests without the key, and bodies that are over the limit or do not come."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.limit, self.patience = settings.max_body_bytes, settings.body_timeout
        self.key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = None
        if self.key is not None and scope["path"] not in OPEN_PATHS and not self._has_key(headers.get(b"authorization", b"")):
            refusal = error_response(
                "The API key is missing or wrong. Send the header `Authorization: Bearer <key>`.",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        elif self._announced(headers.get(b"content-length")) > self.limit:
            refusal = fluent_error_response(self._too_large(int(headers[b"content-length"])))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        scope[DIRECT_SEND] = send
        await self.app(scope, self._bounded(receive), send)

    def _has_key(self, header: bytes) -> bool:
        assert self.key is not None
        scheme, _, key = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)

    def _announced(self, length: bytes | None) -> int:
        return int(length) if length is not None and length.isdigit() else 0

    def _too_large(self, seen: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"The body has {seen} bytes or more; the limit is {self.limit}.",
            fix="Send less, or start the server with a larger server.max_body_bytes.",
        )

    def _bounded(self, receive: Receive) -> Receive:
        """For bodies that do not announce their length, or of which only a part comes."""
        seen, whole = 0, False
        until = asyncio.get_running_loop().time() + self.patience

        async def bounded() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(
                    f"After {self.patience:g} s only {seen} bytes of the body were there.",
                    fix="Send it faster, or start the server with a larger server.body_timeout.",
                ) from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.limit:
                    raise self._too_large(seen)
                whole = not message.get("more_body", False)
            return message

        return bounded


async def _on_fluent_error(request: Request, error: Any) -> Response:
    return fluent_error_response(error)


async def _on_http_exception(request: Request, error: Any) -> Response:
    if error.status_code == 404:
        known = ", ".join(sorted({route.path.replace(":path}", "}") for route in request.app.routes}))
        return error_response(f"There is no {request.url.path} here. There are: {known}.", status=404, code="unknown_path")
    if error.status_code == 405:
        allowed = error.headers["Allow"]
        return error_response(
            f"{request.url.path} does not take {request.method}, but {allowed}.",
            status=405,
            code="method_not_allowed",
            headers=error.headers,
        )
    return error_response(str(error.detail), status=error.status_code, code=None, headers=error.headers)


async def _on_client_left(request: Request, error: Any) -> Response:
    log.debug("client left %s", request.url.path)
    return Response(status_code=499)


async def _on_bug(request: Request, error: Any) -> Response:
    return error_response("Internal error.", status=500, code=FluentError.code)
