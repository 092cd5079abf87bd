"""Holds a plugin to the contract of `hookspecs.py` before it is registered, with errors that say where and what to do.

Pluggy's own `check_pending()` knows that a hook is unknown, but not which distribution and file to open.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from typing import TYPE_CHECKING, Any

from .. import hookspecs
from ..errors import PluginError
from ..hookspecs import API_VERSION, PROJECT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .discovery import PluginInfo

_MARK = f"{PROJECT}_impl"


def hook_arguments() -> dict[str, tuple[str, ...]]:
    """Every hook there is, with its arguments."""
    return {
        name: tuple(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if inspect.isfunction(function) and hasattr(function, f"{PROJECT}_spec")
    }


def implementations(plugin: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, function, options) of everything marked with `@hookimpl`."""
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name)
        if isinstance(function, property):
            continue
        function = getattr(plugin, name, None)
        options = getattr(function, _MARK, None)
        if inspect.isroutine(function) and isinstance(options, dict):
            yield name, function, options


def location(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "unknown place"


def check(info: PluginInfo) -> None:
    """Raises `PluginError` that names distribution, version, file and what to do."""
    _check_version(info)
    if inspect.isclass(info.plugin):
        raise PluginError(
            f"{info} is a class.", fix=f"Let the entry point name an instance: `plugin = {info.plugin.__name__}()`."
        )
    known = hook_arguments()
    marked = {name: (function, options) for name, function, options in implementations(info.plugin)}
    for name, (function, options) in marked.items():
        hook = options.get("specname") or name
        if hook not in known:
            if options.get("optionalhook"):
                continue
            near = difflib.get_close_matches(hook, known, n=1)
            raise PluginError(
                f"{info} implements the hook {hook!r} at {location(function)}, which does not exist in API version "
                f"{API_VERSION}.",
                fix=f"Rename it to {near[0]!r}." if near else f"Use one of: {', '.join(sorted(known))}.",
            )
        if options.get("wrapper") or options.get("hookwrapper"):
            raise PluginError(
                f"{info} wraps the hook {hook!r} at {location(function)}; FluentLLM calls each plugin on its own, "
                "so there is nothing to wrap.",
                fix="Make it a plain @hookimpl.",
            )
        _check_arguments(info, hook, function, known[hook])
    for name in sorted(known.keys() - marked.keys()):
        function = getattr(info.plugin, name, None)
        if inspect.isroutine(function) and not hasattr(function, f"{PROJECT}_spec"):
            raise PluginError(
                f"{info} has a function {name!r} at {location(function)} without a mark.", fix="Put @hookimpl on it."
            )
    info.hooks = tuple(sorted(options.get("specname") or name for name, (_, options) in marked.items()))


def _check_version(info: PluginInfo) -> None:
    module = sys.modules.get(info.value.split(":")[0])
    version = getattr(info.plugin, "FLUENT_API_VERSION", getattr(module, "FLUENT_API_VERSION", API_VERSION))
    if version != API_VERSION:
        newer = isinstance(version, int) and version > API_VERSION
        raise PluginError(
            f"{info} is written for plugin API version {version!r}; this FluentLLM has version {API_VERSION}.",
            fix=f"Upgrade fluentllm, or install an older {info.distribution}." if newer else f"Upgrade {info.distribution}.",
        )


def _check_arguments(info: PluginInfo, hook: str, function: Any, allowed: tuple[str, ...]) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise PluginError(
            f"{info} implements {hook!r} at {location(function)} as an async function; hooks are synchronous.",
            fix="Write `def` instead of `async def`.",
        )
    for parameter in inspect.signature(function).parameters.values():
        argument = parameter.name
        if parameter.default is not parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if argument not in allowed:
            near = difflib.get_close_matches(argument, allowed, n=1) or list(allowed)
            raise PluginError(
                f"{info} implements {hook!r} at {location(function)} with the argument {argument!r}; "
                f"the hook has {', '.join(repr(name) for name in allowed)}.",
                fix=f"Rename the argument to {near[0]!r}, or leave it out.",
            )
