"""Finds plugins by their entry points, without importing any, and says which of them may load.

First stage of `core/plugins/manager.py`. Entry points of the group `fluentllm.plugins` name an object and, as extras, the
processes it runs in: `my_policy = "my_package.plugin:plugin [engine]"`.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, PluginError
from ..hookspecs import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

log = logging.getLogger("fluentllm.plugins")

OWN_DISTRIBUTION = "fluentllm"
PROCESSES = ("frontend", "engine", "executor", "cli")
ALLOW_VARIABLE = "FLUENT_PLUGINS"
RESERVED_NAMES = ("allow", "deny")
"""Settings that lie beside the plugins' own at `plugins.<name>`."""

State = Literal["found", "loaded", "excluded", "failed", "missing"]


@dataclass(slots=True)
class PluginInfo:
    """What is known of one plugin, loaded or not."""

    name: str
    value: str
    """`module:attribute`, as its entry point has it."""
    distribution: str
    version: str
    processes: tuple[str, ...]
    """Where it runs; empty means everywhere."""
    builtin: bool
    entry: metadata.EntryPoint | None = None
    """None for a plugin that was handed over as an object."""
    state: State = "found"
    """found: not needed here, so not imported. excluded: by an allow or deny list. missing: its module is gone."""
    problem: str | None = None
    """Why it is not loaded, if it should be."""
    burden: str | None = None
    """What it costs a process that it should not, though it is loaded."""
    file: str | None = None
    """Where its module lies, once imported."""
    hooks: tuple[str, ...] = ()
    import_seconds: float = 0.0
    plugin: Any = None

    def __str__(self) -> str:
        file = f", {self.file}" if self.file else ""
        return f"plugin {self.name!r} ({self.distribution} {self.version}{file})"

    def runs_in(self, processes: Collection[str]) -> bool:
        return not self.processes or any(process in processes for process in self.processes)


def normalized(name: str) -> str:
    """The form in which plugin names are compared and in which they stand in the config: `My-Policy` is `my_policy`."""
    return re.sub(r"[-_.]+", "_", name).lower()


def discover(entries: Iterable[metadata.EntryPoint] | None = None) -> list[PluginInfo]:
    """Every plugin that is installed, by name. Raises `PluginError` for an entry that no process could load."""
    found = []
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP) if entries is None else entries:
        name, version = ("unknown distribution", "?") if entry.dist is None else _identity(entry.dist)
        if name is None:
            log.warning("The plugin %r is left out: its distribution is being installed or removed right now.", entry.name)
            continue
        info = PluginInfo(
            name=normalized(entry.name),
            value=entry.value.split("[")[0].strip(),
            distribution=name,
            version=version,
            processes=tuple(entry.extras),
            builtin=normalized(name) == OWN_DISTRIBUTION,
            entry=entry,
        )
        unknown = [process for process in info.processes if process not in PROCESSES]
        if unknown:
            raise PluginError(
                f"{info} declares the process {unknown[0]!r} in its entry point `{entry.name} = {entry.value!r}`.",
                fix=f"Name only these: {', '.join(PROCESSES)}; then reinstall {name}.",
            )
        if info.name in RESERVED_NAMES:
            raise PluginError(
                f"{info} has a name that is a setting of its own (`plugins.{info.name}`).", fix="Rename its entry point."
            )
        found.append(info)
    return sorted(found, key=lambda info: (not info.builtin, info.name, info.distribution))


def _identity(distribution: metadata.Distribution) -> tuple[str | None, str]:
    """Name and version; no name if the file that says so is missing, which pip, at work, leaves so for a moment."""
    fields = distribution.metadata
    return (fields["Name"], fields["Version"]) if fields else (None, "?")


def allowed_by_environment(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """`FLUENT_PLUGINS`: None if it is unset (all may load), else the third-party plugins that may."""
    value = (os.environ if environ is None else environ).get(ALLOW_VARIABLE)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def admit(found: list[PluginInfo], allow: Collection[str] | None, deny: Collection[str]) -> list[str]:
    """Mark as excluded what the lists exclude, and make sure that the rest have names of their own.

    Returns the names in `deny` that no plugin has. Raises `ConfigError` for a name in `allow` that no plugin has, and
    `PluginError` for two plugins of one name.
    """
    names = {info.name for info in found}
    allowed = None if allow is None else {normalized(name) for name in allow}
    denied = {normalized(name) for name in deny}
    unknown = sorted((allowed or set()) - names)
    if unknown:
        third_party = sorted(info.name for info in found if not info.builtin)
        raise ConfigError(
            f"The plugin {unknown[0]!r} is to be allowed ({ALLOW_VARIABLE} or `plugins.allow`), but is not installed; "
            f"installed third-party plugins: {', '.join(third_party) or 'none'}.",
            fix="Install it, or take it off the list.",
            param="plugins.allow",
        )
    admitted: dict[str, PluginInfo] = {}
    for info in found:
        if info.name in denied:
            info.state, info.problem = "excluded", "on the deny list"
        elif not info.builtin and allowed is not None and info.name not in allowed:
            info.state, info.problem = "excluded", "not on the allow list"
        elif info.name in admitted:
            raise PluginError(
                f"Two plugins are named {info.name!r}: {admitted[info.name]} and {info}.",
                fix=f"Uninstall {admitted[info.name].distribution} or {info.distribution}, "
                f"or start without both: `plugins.deny: [{info.name}]`.",
            )
        else:
            admitted[info.name] = info
    return sorted(denied - names)
