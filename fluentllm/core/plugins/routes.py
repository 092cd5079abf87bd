"""HTTP routes that plugins gave, before the front end makes an application of them. Two of one path and method clash."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PluginError
from .clashes import clash

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from .discovery import PluginInfo


@dataclass(frozen=True, slots=True)
class Route:
    """`endpoint(request) -> response`, async; see `protocols.RegisterRoute`."""

    path: str
    endpoint: Callable[[Any], Awaitable[Any]]
    methods: tuple[str, ...]
    summary: str
    plugin: str
    source: str
    """The plugin with its distribution, version and file, for error texts."""


class RouteTable:
    """Collects routes, in the order in which they came."""

    def __init__(self) -> None:
        self.routes: list[Route] = []

    def registrar(self, info: PluginInfo) -> Callable[..., None]:
        """The `register` that one plugin's `fluent_routes` gets."""

        def register(
            path: str, endpoint: Callable[[Any], Awaitable[Any]], *, methods: Sequence[str] = ("GET",), summary: str = ""
        ) -> None:
            if isinstance(methods, str):
                raise PluginError(f"{info} gives the methods of the route {path!r} as a string.", fix='Give a tuple: ("GET",).')
            self.add(Route(path, endpoint, tuple(method.upper() for method in methods), summary, info.name, str(info)))

        return register

    def add(self, route: Route) -> None:
        """Raises `PluginError` if the route cannot be served, or is served already."""
        if not route.path.startswith("/"):
            raise PluginError(f"{route.source} gives the route {route.path!r}.", fix="Begin the path with `/`.")
        if not callable(route.endpoint) or not route.methods:
            raise PluginError(
                f"{route.source} gives the route {route.path!r} without an endpoint or without methods.",
                fix='Call register("/path", endpoint, methods=("GET",)).',
            )
        if not inspect.iscoroutinefunction(route.endpoint) and not inspect.iscoroutinefunction(
            getattr(route.endpoint, "__call__", None)  # noqa: B004 (an object may be called, and be awaited for its answer)
        ):
            raise PluginError(
                f"{route.source} gives the route {route.path!r} an endpoint that is not async.",
                fix="Write it as `async def endpoint(request)`.",
            )
        if (wrong := _wrong_parameters(route.path)) is not None:
            raise PluginError(f"{route.source} gives the route {route.path!r}: {wrong}.", fix="Write {name} or {name:path}.")
        for other in self.routes:
            shared = set(route.methods) & set(other.methods)
            if shared and _shape(route.path) == _shape(other.path):
                first, second = ((one.plugin, one.source) for one in (other, route))
                raise clash("serve", f"{sorted(shared)[0]} {route.path}", first, second)
        self.routes.append(route)

    def remove_plugin(self, plugin: str) -> None:
        self.routes[:] = [route for route in self.routes if route.plugin != plugin]


CONVERTERS = ("str", "path", "int", "float", "uuid")
"""Of Starlette, of parameters in a path."""


def _wrong_parameters(path: str) -> str | None:
    """What the front end could not make a route of."""
    names = []
    for parameter in re.findall(r"\{([^{}]*)\}", path):
        name, _, kind = parameter.partition(":")
        if not name.isidentifier():
            return f"{{{parameter}}} has no name"
        if kind and kind not in CONVERTERS:
            return f"{kind!r} is none of {', '.join(CONVERTERS)}"
        if name in names:
            return f"the name {name!r} occurs twice"
        names.append(name)
    return "its braces do not fit together" if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", path)) else None


def specific_first(routes: Iterable[Route]) -> list[Route]:
    """So that a path with parameters, such as a plugin's `/{page:path}`, takes what no other route takes: those without come
    first, then those whose fixed beginning is longer."""
    return sorted(routes, key=lambda route: ("{" in route.path, ":path}" in route.path, -len(route.path.partition("{")[0])))


def _shape(path: str) -> str:
    """Paths that differ only in the names of their parameters are the same: `/a/{x}` and `/a/{y}`."""
    return re.sub(r"\{[^}]*\}", "{}", path.rstrip("/") or "/")
