"""What is said where something has been offered already: by another plugin, or by the same one."""

from __future__ import annotations

from ..errors import PluginError


def clash(offer: str, what: str, first: tuple[str, str], second: tuple[str, str]) -> PluginError:
    """`offer`, a verb as of several (`serve`), and `what` they offer; (name, text) of both plugins, the text with distribution,
    version and file."""
    (name, one), (other_name, other) = first, second
    if name == other_name:
        return PluginError(f"{other} {offer}s {what} twice.", fix="Register it once.")
    return PluginError(
        f"Two plugins {offer} {what}: {one} and {other}.",
        fix=f"Uninstall one of them, or add {other_name!r} or {name!r} to `plugins.deny`.",
    )
