"""HTTP routes that plugins gave, before the front end makes an application of them. Two of one path and method clash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

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
        """Raises `PluginError` if the route cannot be served, or another plugin serves it."""
        if not route.path.startswith("/"):
            raise PluginError(f"{route.source} gives the route {route.path!r}.", fix="Begin the path with `/`.")
        if not callable(route.endpoint) or not route.methods:
            raise PluginError(
                f"{route.source} gives the route {route.path!r} without an endpoint or without methods.",
                fix='Call register("/path", endpoint, methods=("GET",)).',
            )
        for other in self.routes:
            shared = set(route.methods) & set(other.methods)
            if shared and _shape(route.path) == _shape(other.path):
                raise PluginError(
                    f"Two plugins serve {sorted(shared)[0]} {route.path}: {other.source} and {route.source}.",
                    fix=f"Uninstall one of them, or add {route.plugin!r} or {other.plugin!r} to `plugins.deny`.",
                )
        self.routes.append(route)

    def remove_plugin(self, plugin: str) -> None:
        self.routes[:] = [route for route in self.routes if route.plugin != plugin]


def _shape(path: str) -> str:
    """Paths that differ only in the names of their parameters are the same: `/a/{x}` and `/a/{y}`."""
    return re.sub(r"\{[^}]*\}", "{}", path.rstrip("/") or "/")
