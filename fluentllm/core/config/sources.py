"""Reads what was given where: a YAML, JSON or TOML file with its lines, environment variables, the command line.

Knows no setting; `tree.py` decides what the keys mean. First stage of `core/config/loading.py`.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

ENVIRONMENT_PREFIX = "FLUENT_"
LEVEL_SEPARATOR = "__"
KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """One value, and where it was given."""

    path: KeyPath
    value: Any
    """Text if `text`; else what the file or the caller had. A dict is a section or a setting that is a mapping."""
    where: str
    """`serve.yaml, line 3`, `environment variable FLUENT_SERVER__PORT`, `command line --port`."""
    text: bool = False
    """The value is a string that stands for something of the setting's type."""
    file: ConfigFile | None = None
    """Knows the lines of what lies inside `value`."""

    def inside(self, key: str, value: Any) -> Given:
        """What this section gives for one of its keys."""
        path = (*self.path, key)
        return Given(path, value, self.file.where(path) if self.file else self.where, self.text, self.file)


class _Loader(yaml.SafeLoader):
    """Reads numbers like 1e-3 as numbers, as YAML 1.2 and JSON do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class ConfigFile:
    """A parsed file: its tree, and the line of every key in it."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` if the file cannot be read or parsed, or gives a key twice."""
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"Cannot read {path}: {reason}.", fix="Give the path of a YAML, JSON or TOML file.") from error
        if path.suffix.lower() == ".toml":
            self.tree = self._parse_toml(text)
        elif path.suffix.lower() == ".json":
            self.tree = self._parse_json(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            self.tree = self._parse_yaml(text)
        else:
            message = f"{path} is neither YAML nor JSON nor TOML by its name."
            raise ConfigError(message, fix="Name it .yaml, .yml, .json or .toml.")

    def where(self, path: KeyPath) -> str:
        """The line of the key, or of the nearest section around it that has one."""
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.lines:
                return f"{self.path}, line {self.lines[path[:depth]]}"
        return str(self.path)

    def given(self) -> Iterator[Given]:
        """Its top-level keys; sections are dicts."""
        for key, value in self.tree.items():
            yield Given((key,), value, self.where((key,)), file=self)

    def section(self, key: str) -> ConfigFile:
        """What lies under a top-level key, as a file of its own that keeps its lines. Raises `ConfigError` if it is a value."""
        tree = self.tree.get(key)
        if not isinstance(tree, dict | None):
            raise ConfigError(f"{self.where((key,))}: {key} is {tree!r}, not a section.", fix=f"Write settings below `{key}:`.")
        inner = object.__new__(ConfigFile)
        inner.path, inner.tree = self.path, tree or {}
        inner.lines = {path[1:]: line for path, line in self.lines.items() if path[0] == key and len(path) > 1}
        return inner

    def _syntax(self, line: int | None, what: str) -> ConfigError:
        place = f"{self.path}, line {line}" if line else str(self.path)
        return ConfigError(f"{place}: {what}.", fix="Correct the file's syntax.")

    def _parse_json(self, text: str) -> dict[str, Any]:
        """By JSON's rules; YAML, which nearly includes it, knows the lines. It does not allow tabs, which JSON has between
        values only."""
        if not text.strip():
            return {}
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            what = f"not valid JSON: {error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
            raise self._syntax(error.lineno, what) from error
        return self._parse_yaml(text.replace("\t", " "))

    def _parse_yaml(self, text: str) -> dict[str, Any]:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            if not isinstance(node, yaml.MappingNode):
                raise self._syntax(node.start_mark.line + 1, "the file is not a mapping of settings")
            self._note_lines(node, ())
            tree: dict[str, Any] = loader.construct_document(node)
            return tree
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._syntax(mark.line + 1 if mark else None, error.problem or "not valid YAML") from error
        except yaml.YAMLError as error:
            raise self._syntax(None, f"not valid YAML: {error}") from error
        finally:
            loader.dispose()

    def _note_lines(self, node: yaml.MappingNode, prefix: KeyPath) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise self._syntax(line, f"the key {getattr(key, 'value', '?')!r} is not a string")
            path = (*prefix, key.value)
            if path in self.lines:
                raise self._syntax(line, f"the key {key.value!r} was given on line {self.lines[path]} already")
            self.lines[path] = line
            if isinstance(value, yaml.MappingNode):
                self._note_lines(value, path)

    def _parse_toml(self, text: str) -> dict[str, Any]:
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise self._syntax(None, f"not valid TOML: {error}") from error
        table: KeyPath = ()
        for number, line in enumerate(text.splitlines(), 1):
            header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line)
            key = re.match(r"\s*([^=#\[\]{}]+?)\s*=", line)
            if header:
                table = _toml_key(header[1])
                self.lines.setdefault(table, number)
            elif key:
                self.lines.setdefault(table + _toml_key(key[1]), number)
        return tree


def _toml_key(text: str) -> KeyPath:
    """The parts of a dotted, possibly quoted key. A line inside a long string may look like one and be none."""
    try:
        tree: Any = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts = []
    while isinstance(tree, dict):
        key = next(iter(tree))
        parts.append(key)
        tree = tree[key]
    return tuple(parts)


def from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    """`FLUENT_SERVER__PORT` is `server.port`; `FLUENT_PLUGINS`, a comma list, is `plugins.allow`.

    Other variables without a double underscore are none of ours (Kubernetes, for one, makes up `FLUENT_…` names).
    """
    for name, value in sorted(environ.items()):
        where = f"environment variable {name}"
        if name == f"{ENVIRONMENT_PREFIX}PLUGINS":
            yield Given(("plugins", "allow"), [part.strip() for part in value.split(",") if part.strip()], where)
        elif name.startswith(ENVIRONMENT_PREFIX) and LEVEL_SEPARATOR in name:
            path = tuple(part.lower() for part in name.removeprefix(ENVIRONMENT_PREFIX).split(LEVEL_SEPARATOR))
            yield Given(path, value, where, text=True)


def near_misses(environ: Mapping[str, str], keys: Iterator[str]) -> Iterator[tuple[str, str]]:
    """(variable, what was meant): variables that are a setting's name but for the double underscore."""
    squeezed = {key.replace(".", "").replace("_", ""): key for key in keys}
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and LEVEL_SEPARATOR not in name:
            key = squeezed.get(name.removeprefix(ENVIRONMENT_PREFIX).replace("_", "").lower())
            if key is not None:
                yield name, environment_name(key)


def environment_name(key: str) -> str:
    """`server.port` → `FLUENT_SERVER__PORT`."""
    return ENVIRONMENT_PREFIX + key.replace(".", LEVEL_SEPARATOR).upper()


def parse_scalar(text: str) -> Any:
    """What YAML makes of a value typed in a shell. Raises `ValueError`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
