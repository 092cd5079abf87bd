"""Named factories that plugins offered for one purpose, and the choice among them.

Filled by `core/plugins/manager.py` from the hooks that take a `register`; read at assembly, where the config chooses by name or
`auto` asks which entries support the spec in question.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, PluginError
from .clashes import clash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..protocols import Supports


def supports_everything(spec: Any) -> str | None:
    """The default of `supports`."""
    return None


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing on offer."""

    name: str
    factory: Any
    """A callable; for models the `ModelFamily` itself."""
    plugin: str
    """Name of the plugin that offers it."""
    source: str
    """The plugin with its distribution, version and file, for error texts."""
    supports: Supports = supports_everything

    def reason_against(self, spec: Any) -> str | None:
        """None if it supports `spec`, else why not. A `supports` that raises, or says what is no reason, is a reason too, not a
        crash."""
        try:
            reason = self.supports(spec)
        except (Exception, SystemExit) as error:
            return f"its supports() raised {type(error).__name__}: {error}"
        if reason is not None and not isinstance(reason, str):
            return f"its supports() gave {reason!r}, neither None nor the reason why not"
        return reason


class Registry:
    """Entries of one kind by name. `noun` and `setting` make its errors readable."""

    def __init__(self, kind: str, noun: str, setting: str | None = None) -> None:
        self.kind = kind
        self.noun = noun
        self.setting = setting
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Raises `PluginError` if the name is taken, naming who took it."""
        if not isinstance(entry.name, str) or not entry.name or entry.name == "auto":
            raise PluginError(
                f"{entry.source} offers the {self.noun} {entry.name!r}.",
                fix="Give it a name that is a non-empty string other than `auto`.",
            )
        if not callable(entry.factory) and self.kind != "models":
            raise PluginError(
                f"{entry.source} offers the {self.noun} {entry.name!r} with {entry.factory!r}, which cannot be called.",
                fix="Pass a factory as the second argument of register().",
            )
        other = self._entries.get(entry.name)
        if other is not None:
            first, second = ((one.plugin, one.source) for one in (other, entry))
            raise clash("offer", f"the {self.noun} {entry.name!r}", first, second)
        self._entries[entry.name] = entry

    def remove_plugin(self, plugin: str) -> None:
        """Forget what a plugin offered, because its registration broke off half-way."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.plugin != plugin}

    def get(self, name: str, setting: str | None = None) -> Entry:
        """Raises `ConfigError` with the names there are. `setting`: where the name stood, if not in the usual one."""
        setting = setting or self.setting
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        known = ", ".join(self.names()) or "none"
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        where = f"Set `{setting}` to one of these" if setting else "Choose one of these"
        raise ConfigError(
            f"No plugin offers the {self.noun} {name!r}; there are: {known}.",
            fix=f"{hint}{where}, or install a plugin that offers it.",
            param=setting,
        )

    def require(self, name: str, spec: Any) -> Entry:
        """The entry, which must support `spec`. Raises `ConfigError` with its reason if it does not."""
        entry = self.get(name)
        reason = entry.reason_against(spec)
        if reason is None:
            return entry
        others = ", ".join(other.name for other in self.supported(spec)) or "none"
        raise ConfigError(
            f"The {self.noun} {name!r} cannot be used here: {reason}.",
            fix=f"Choose one that can: {others}.",
            param=self.setting,
        )

    def names(self) -> list[str]:
        return sorted(self._entries)

    def supported(self, spec: Any) -> list[Entry]:
        """Entries that can do it, by name."""
        return [entry for entry in self if entry.reason_against(spec) is None]

    def why_not(self, spec: Any) -> dict[str, str]:
        """Name → reason, of those that cannot."""
        reasons = {entry.name: entry.reason_against(spec) for entry in self}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._entries[name] for name in self.names()])

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)
