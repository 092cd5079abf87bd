"""`GET /openapi.json`: an OpenAPI 3.1 document made from the routes that are registered and the Structs they speak.

Routes of other plugins are listed too, with their summary; those that name their Structs by `documented` in full.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from fluentllm import __version__
from fluentllm.frontend.responses import json_response

from .answers import ErrorBody

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from fluentllm.core.plugins.routes import Route

Endpoint = TypeVar("Endpoint", bound="Callable[..., Any]")
_REF = "#/components/schemas/{name}"


def documented(
    *, answer: type | None = None, body: type | None = None, event: type | None = None
) -> Callable[[Endpoint], Endpoint]:
    """Say what an endpoint reads, answers, and sends as events when it streams."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.__fluent_schema__ = {"answer": answer, "body": body, "event": event}  # type: ignore[attr-defined]
        return endpoint

    return mark


async def openapi(request: Request) -> Response:
    state = request.app.state
    if not hasattr(state, "openapi"):
        state.openapi = build(state.routes)
    return json_response(state.openapi)


def build(routes: Sequence[Route]) -> dict[str, Any]:
    """The document."""
    kinds: list[type] = [ErrorBody]
    for route in routes:
        kinds += [kind for kind in _marks(route).values() if kind is not None and kind not in kinds]
    refs, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema = dict(zip(kinds, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in route.methods:
            paths.setdefault(_path(route.path), {})[method.lower()] = _operation(route, method, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "FluentLLM", "version": __version__, "description": "OpenAI-compatible inference API."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "If server.api_key is set."}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: Route, method: str, schema: dict[type, dict[str, Any]]) -> dict[str, Any]:
    marks = _marks(route)
    answer, body, event = marks.get("answer"), marks.get("body"), marks.get("event")
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": schema[answer]}
    if event is not None:
        content["text/event-stream"] = {"schema": schema[event]}
    name = re.sub(r"\W+", "_", f"{method.lower()}{route.path}").strip("_")
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": route.summary,
        "tags": [route.plugin],
        "responses": {
            "200": {"description": "As asked for.", **({"content": content} if content else {})},
            "default": {"description": "What went wrong.", "content": {"application/json": {"schema": schema[ErrorBody]}}},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema[body]}}}
    names = re.findall(r"\{(\w+)(?::\w+)?\}", route.path)
    if names:
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    return operation


def _path(path: str) -> str:
    """Starlette's `{model:path}` is OpenAPI's `{model}`."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


def _marks(route: Route) -> dict[str, type | None]:
    return getattr(route.endpoint, "__fluent_schema__", {})
