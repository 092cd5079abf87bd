"""Fills the tree of settings: one YAML or TOML file, then the environment, then the command line; the later wins.

    loaded = load(Path("serve.yaml"), {"server.port": 8001}, os.environ)
    loaded.settings.server.port, loaded.origins["server.port"]

Every mistake of every source is reported at once, each with its place, the value seen and the nearest valid key.
`sources.py` reads, `tree.py` knows the keys, `describe.py` explains them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from fluentllm.core.plugins import PluginManager  # the core's own room: what finds and loads plugins
from fluentllm.core.plugins.discovery import admit, discover, normalized

from ..errors import ConfigError
from ..settings import PluginSettings, Settings
from .sources import ConfigFile, Given, environment_name, from_environment, near_misses
from .tree import UNSET, Section, Setting, nearest, settings_tree

Structs = Mapping[str, "type[Struct] | None"]
"""Plugin name → the Struct of its settings; None: it has none, or is not asked for any."""
StructSource = Callable[[PluginSettings, frozenset[str]], Structs]
"""Given the allow and deny lists and the names of the plugins that were given settings, their Structs."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where they came from."""

    settings: Settings
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key → where it was given, for those that were given."""
    tree: Section = field(default_factory=lambda: settings_tree({}))


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in what was given."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} {self.fix}"


def load(
    file: Path | str | ConfigFile | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    named: Mapping[str, str] | None = None,
    structs: Structs | StructSource | None = None,
) -> Loaded:
    """Read and check everything. Raises `ConfigError` that lists every mistake.

    `overrides`: dotted key → value, the strongest source; a string stands for a value of the setting's type, as in a
    shell. `named`: dotted key → how the override was given (`command line, --port`), for messages.
    `environ`: `os.environ` if None. `structs`: the plugins' Structs; if None the installed plugins are asked, of which
    only those are imported that were given settings.
    """
    environ = os.environ if environ is None else environ
    given = _gather(file, overrides, environ, named)
    if structs is None:
        structs = installed_structs
    if callable(structs):
        structs = structs(_plugin_lists(given), _configured_plugins(given))
    filler = _Filler(settings_tree(structs))
    for item in given:
        filler.fill(filler.tree, item, item.path)
    for variable, meant in near_misses(environ, (leaf.key for leaf in filler.tree.leaves())):
        filler.problems.append(Problem(f"environment variable {variable}", "unknown.", f"Did you mean {meant}?"))
    settings = filler.build()
    if filler.problems:
        raise _as_error(filler.problems)
    return Loaded(settings, filler.origins, filler.tree)


def load_lists(
    file: Path | str | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> PluginSettings:
    """The allow and deny lists alone, which decide what may be imported before anything else can be checked."""
    return _plugin_lists(_gather(file, overrides, os.environ if environ is None else environ, None))


def to_json(loaded: Loaded) -> bytes:
    """The settings, fully resolved, for a child process."""
    return msgspec.json.encode(loaded.settings)


def from_json(data: bytes, structs: Structs | None = None) -> Settings:
    """What `to_json` wrote, bound to the plugins that this process loads (`PluginManager.config_structs()`)."""
    return bind(msgspec.json.decode(data, type=Settings), structs or {})


def bind(settings: Settings, structs: Structs) -> Settings:
    """Give each of these plugins its Struct at `settings.plugin[name]`, with defaults where nothing was given.

    Other plugins' settings stay as they are. Raises `ConfigError` if a plugin's settings lack what must be given.
    """
    for name, struct in structs.items():
        given = settings.plugin.get(name, {})
        if struct is None or isinstance(given, struct):
            continue
        try:
            settings.plugin[name] = msgspec.convert(given, struct)
        except msgspec.ValidationError as error:
            hint = f"Give it in the config file or as {environment_name(f'plugins.{name}.KEY')}."
            message = f"The settings at plugins.{name} do not fit: {error}."
            raise ConfigError(message, fix=hint, param=f"plugins.{name}") from error
    return settings


def installed_structs(lists: PluginSettings, configured: frozenset[str]) -> Structs:
    """Ask the installed plugins. Imports only those in `configured`."""
    infos = discover()
    admit(infos, lists.allow, lists.deny)
    names: dict[str, type[Struct] | None] = {info.name: None for info in infos}
    if configured & names.keys():
        allowed = names.keys() if lists.allow is None else lists.allow  # decided here, whatever the process's environment says
        asked = PluginManager.load(None, allowed, lists.deny, only=configured, hooks=("fluent_config",))
        names.update(asked.config_structs())
    return names


def every_struct(lists: PluginSettings, configured: frozenset[str]) -> Structs:
    """Ask the installed plugins, all of them, whether configured or not."""
    return installed_structs(lists, configured | {info.name for info in discover()})


def _gather(
    file: Path | str | ConfigFile | None,
    overrides: Mapping[str, Any] | None,
    environ: Mapping[str, str],
    named: Mapping[str, str] | None,
) -> list[Given]:
    """All that was given, the weakest source first."""
    if file is not None and not isinstance(file, ConfigFile):
        file = ConfigFile(Path(file))
    given = list(file.given()) if file is not None else []
    given += from_environment(environ)
    for key, value in (overrides or {}).items():
        where = (named or {}).get(key, f"override of {key}")
        given.append(Given(tuple(key.split(".")), value, where, text=isinstance(value, str)))
    return given


def _plugin_lists(given: list[Given]) -> PluginSettings:
    filler = _Filler(settings_tree({}))
    for item in given:
        if item.path[0] != "plugins":
            continue
        if item.path == ("plugins",) and isinstance(item.value, dict):
            lists = {key: value for key, value in item.value.items() if key in ("allow", "deny")}
            filler.fill(filler.tree, Given(item.path, lists, item.where, file=item.file), item.path)
        elif item.path[1:] in (("allow",), ("deny",)):
            filler.fill(filler.tree, item, item.path)
    if filler.problems:
        raise _as_error(filler.problems)
    return filler.build().plugins


def _configured_plugins(given: list[Given]) -> frozenset[str]:
    names = set()
    for item in given:
        if item.path[0] == "plugins" and len(item.path) > 1:
            names.add(item.path[1])
        elif item.path == ("plugins",) and isinstance(item.value, dict):
            names.update(key for key in item.value if isinstance(key, str))
    return frozenset(normalized(name) for name in names) - {"allow", "deny"}


class _Filler:
    """Puts given values into the tree, noting where each came from and what is wrong with it."""

    def __init__(self, tree: Section) -> None:
        self.tree = tree
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def fill(self, node: Section | Setting, given: Given, rest: tuple[str, ...]) -> None:
        """`rest`: the part of the path that leads on from `node`."""
        if isinstance(node, Section):
            if rest:
                self._descend(node, given, rest)
            elif isinstance(given.value, dict):
                for key, value in given.value.items():
                    self._descend(node, given.inside(str(key), value), (str(key),))
            elif given.value is not None:
                self._wrong(given, node.key, f"{node.key} is a section, not a value, but {_seen(given.value)} was given.")
            return
        if rest:
            self._wrong(given, node.key, f"{node.key} has no settings inside, but {'.'.join(given.path)} was given.")
            return
        try:
            self.values[node.key] = node.convert(given)
            self.origins[node.key] = given.where
        except ValueError as error:
            reason = str(error).removesuffix(".")
            fix = f"Give {node.type_name()}{f' ({node.unit})' if node.unit else ''}."
            self.problems.append(Problem(given.where, f"{node.key} is {_seen(given.value)}: {reason}.", fix))

    def _descend(self, node: Section, given: Given, rest: tuple[str, ...]) -> None:
        name = normalized(rest[0]) if node.key == "plugins" and rest[0] not in node.children else rest[0]
        child = node.children.get(name)
        if child is not None:
            self.fill(child, given, rest[1:])
            return
        wrong = f"{node.key}.{rest[0]}" if node.key else rest[0]
        if node.struct is None:
            plugin = node.key.partition(".")[2]
            fix = (
                f"Take it away; the plugin {plugin!r} has no settings, may not load (plugins.allow, plugins.deny) or cannot "
                "(`fluent plugins doctor`)."
            )
        else:
            keys = [leaf.key for leaf in self.tree.leaves()] + [child.key for child in _sections(self.tree)]
            meant = nearest(".".join((*wrong.split("."), *rest[1:])), keys) or nearest(wrong, keys)
            fix = f"Did you mean {self._spelt(meant, given)}?" if meant else f"Valid here: {', '.join(node.children)}."
        self.problems.append(Problem(given.where, f"unknown key {wrong!r} (its value: {_seen(given.value)}).", fix))

    def _spelt(self, key: str, given: Given) -> str:
        return environment_name(key) if given.where.startswith("environment") else key

    def _wrong(self, given: Given, key: str, what: str) -> None:
        self.problems.append(Problem(given.where, what, f"See: fluent config explain {key}"))

    def build(self) -> Settings:
        """The Structs, defaults where nothing was given."""
        plugins = self.tree.children["plugins"]
        assert isinstance(plugins, Section)
        own = {name: child for name, child in plugins.children.items() if isinstance(child, Section)}
        core = {
            name: self._build_section(child, skip=frozenset(own) if name == "plugins" else frozenset())
            for name, child in self.tree.children.items()
            if isinstance(child, Section)
        }
        core["plugin"] = {
            name: self._build_section(child)
            for name, child in own.items()
            if child.struct is not None and (_complete(child) or any(leaf.key in self.values for leaf in child.leaves()))
        }
        return Settings() if self.problems else Settings(**core)

    def _build_section(self, section: Section, skip: frozenset[str] = frozenset()) -> Any:
        arguments: dict[str, Any] = {}
        assert section.struct is not None
        attributes = {info.encode_name: info.name for info in msgspec.structs.fields(section.struct)}
        for name, child in section.children.items():
            if name in skip:
                continue
            if isinstance(child, Section):
                arguments[attributes[name]] = self._build_section(child)
            elif child.key in self.values:
                arguments[attributes[name]] = self.values[child.key]
            elif child.default is UNSET:
                self.problems.append(
                    Problem("settings", f"{child.key} must be given.", f"It is {child.type_name()}: {child.help}")
                )
                return None
        try:
            return section.struct(**arguments)
        except (ValueError, TypeError) as error:
            given = sorted({self.origins[leaf.key] for leaf in section.leaves() if leaf.key in self.origins})
            hint = f"See: fluent config explain {section.key}"
            self.problems.append(Problem("; ".join(given) or "settings", f"{section.key}: {error}.", hint))
            return None


def _sections(section: Section) -> list[Section]:
    inner = [child for child in section.children.values() if isinstance(child, Section)]
    return inner + [below for child in inner for below in _sections(child)]


def _complete(section: Section) -> bool:
    """Nothing in it must be given. (What is missing is an error once the plugin is configured, or loaded.)"""
    return all(leaf.default is not UNSET for leaf in section.leaves())


def _seen(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _as_error(problems: list[Problem]) -> ConfigError:
    unique = list({str(problem): problem for problem in problems}.values())
    if len(unique) == 1:
        problem = unique[0]
        return ConfigError(f"{problem.where}: {problem.what}", fix=problem.fix)
    lines = "".join(f"\n  {problem}" for problem in unique)
    return ConfigError(f"{len(unique)} mistakes in the settings:{lines}", fix="See: fluent config explain KEY")
