"""Subcommands that plugins add to `fluent`, watched so that two of one name stop the start, naming both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PluginError

if TYPE_CHECKING:
    import typer

    from .discovery import PluginInfo


class CommandTable:
    """Compares the application before and after each plugin's `fluent_commands`."""

    def __init__(self, app: typer.Typer) -> None:
        self._app = app
        self._owners = dict.fromkeys(self._names(), "fluent itself")
        self._before = (0, 0)
        self._callback = app.registered_callback

    def begin(self, info: PluginInfo) -> None:
        self._before = (len(self._app.registered_commands), len(self._app.registered_groups))

    def roll_back(self, plugin: str) -> None:
        """Take back what a plugin added before it raised."""
        commands, groups = self._before
        del self._app.registered_commands[commands:]
        del self._app.registered_groups[groups:]
        self._app.registered_callback = self._callback

    def end(self, info: PluginInfo) -> None:
        """Raises `PluginError` for a name that is taken, or a callback of the whole application."""
        if self._app.registered_callback is not self._callback:
            raise PluginError(f"{info} replaces the callback of `fluent` itself.", fix="Add a command or a group instead.")
        commands, groups = self._before
        for name in self._names(commands, groups):
            if self._owners.get(name) == str(info):
                raise PluginError(f"{info} adds the command `fluent {name}` twice.", fix="Add it once.")
            if name in self._owners:
                raise PluginError(
                    f"Two plugins add the command `fluent {name}`: {self._owners[name]} and {info}.",
                    fix=f"Uninstall one of them, or start without third-party plugins: FLUENT_PLUGINS= fluent {name} …",
                )
            self._owners[name] = str(info)

    def _names(self, commands: int = 0, groups: int = 0) -> list[str]:
        names = []
        for command in self._app.registered_commands[commands:]:
            names.append(command.name or (command.callback.__name__.replace("_", "-") if command.callback else ""))
        for group in self._app.registered_groups[groups:]:
            info = group.typer_instance.info if group.typer_instance else None
            names.append(group.name or (info.name if info and isinstance(info.name, str) else "") or "")
        return names
