"""Explains the tree of settings: one key for a reader, all of it as JSON Schema or as a table for the docs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from ..settings import Settings
from .tree import UNSET, Section, Setting, nearest, settings_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config import Loaded


class Explanation(Struct, frozen=True, kw_only=True):
    """One setting, as `fluent config explain` prints it."""

    key: str
    help: str
    type: str
    unit: str | None
    default: Any
    required: bool
    value: Any
    origin: str
    """Where the value came from; `default` if nobody gave one."""

    def as_dict(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)


def explain(key: str, loaded: Loaded) -> list[Explanation]:
    """The setting, or every setting of the section. Raises `ConfigError` with the nearest valid key."""
    node = loaded.tree.find(key)
    if node is None:
        keys = [leaf.key for leaf in loaded.tree.leaves()]
        meant = nearest(key, keys)
        fix = f"Did you mean {meant}?" if meant else f"Sections: {', '.join(loaded.tree.children)}."
        raise ConfigError(f"There is no setting {key!r}.", fix=fix, param=key)
    leaves = [node] if isinstance(node, Setting) else list(node.leaves())
    return [
        Explanation(
            key=leaf.key,
            help=leaf.help,
            type=leaf.type_name(),
            unit=leaf.unit,
            default=None if leaf.default is UNSET else leaf.default,
            required=leaf.default is UNSET,
            value=value_of(loaded.settings, leaf.key),
            origin=loaded.origins.get(leaf.key, "default"),
        )
        for leaf in leaves
    ]


def value_of(settings: Settings, key: str) -> Any:
    """The value at a dotted key, plugins' settings included."""
    parts = key.split(".")
    if parts[0] == "plugins" and len(parts) > 2:
        node: Any = settings.plugin.get(parts[1])
        parts = parts[2:]
    else:
        node = settings
    for part in parts:
        if node is None:
            return None  # a plugin whose settings are not complete
        if isinstance(node, Struct):
            names = {info.encode_name: info.name for info in msgspec.structs.fields(node)}
            node = getattr(node, names[part])
    return node


def as_tree(settings: Settings) -> dict[str, Any]:
    """The settings laid out as in a file."""
    tree: dict[str, Any] = msgspec.to_builtins(settings)
    tree["plugins"].update(tree.pop("plugin"))
    return tree


def schema(structs: Mapping[str, type[Struct] | None] | None = None) -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file, with plugins' settings and units."""
    plugins = {name: struct for name, struct in (structs or {}).items() if struct is not None}
    _, parts = msgspec.json.schema_components([Settings, *plugins.values()], ref_template="#/$defs/{name}")
    references, _ = msgspec.json.schema_components([*plugins.values()], ref_template="#/$defs/{name}")
    root = parts.pop("Settings")
    del root["properties"]["plugin"]
    parts["PluginSettings"]["properties"].update(zip(plugins, references, strict=True))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "title": "FluentLLM settings", "$defs": parts}


def markdown(structs: Mapping[str, type[Struct] | None] | None = None) -> str:
    """Every setting in one table a section, for docs/configuration.md."""
    lines = []
    for section in settings_tree(structs or {}).children.values():
        assert isinstance(section, Section)
        leaves = list(section.leaves())
        lines += [
            f"### `{section.key}`",
            "",
            "| setting | type | unit | default | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        for leaf in leaves:
            default = "required" if leaf.default is UNSET else f"`{msgspec.json.encode(leaf.default).decode()}`"
            lines.append(f"| `{leaf.key}` | {leaf.type_name()} | {leaf.unit or ''} | {default} | {leaf.help} |")
        lines.append("")
    return "\n".join(lines)
