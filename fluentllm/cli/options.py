"""The one place where the command line becomes settings: `--config`, `--set key=value` and named flags.

A command declares its flags with the types below and hands what it got to `load`:

    def serve(model: options.Model = None, port: options.Port = None, config: options.Config = None, sets: options.Sets = None):
        loaded = options.load(config, {"model.name": model, "server.port": port}, sets)

A flag that was not given is None and overrides nothing. Help texts come from `core/settings.py`. Modules that use these
types must import this module at run time, since Typer evaluates their annotations.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluentllm.core.config.tree import Setting, settings_tree
from fluentllm.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fluentllm.core.config import Loaded
    from fluentllm.core.config.sources import ConfigFile
    from fluentllm.core.settings import PluginSettings

CONFIG_VARIABLE = "FLUENT_CONFIG"

_TREE = settings_tree({})
_FLAGS: dict[str, str] = {}
"""Dotted key → how the command line spells it."""


def flag(key: str, *names: str) -> Any:
    """A Typer option for the setting, with its help text: `flag("server.port", "--port", "-p")`."""
    _FLAGS[key] = names[0]
    return typer.Option(*names, help=_help(key), show_default=False)


def argument(key: str, name: str) -> Any:
    """A positional argument for the setting."""
    _FLAGS[key] = name
    return typer.Argument(metavar=name, help=_help(key), show_default=False)


def _help(key: str) -> str:
    setting = _TREE.find(key)
    assert isinstance(setting, Setting), key
    unit = f", {setting.unit}" if setting.unit else ""
    default = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    return f"{setting.help} ({key}{unit}; default {default})"  # no square brackets: rich takes them for markup and drops them


Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML or TOML file of settings.", envvar=CONFIG_VARIABLE, show_default=False),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted key; repeatable.", show_default=False),
]
Model = Annotated[str | None, argument("model.name", "MODEL")]
ServedName = Annotated[str | None, flag("model.served_name", "--served-name")]
Revision = Annotated[str | None, flag("model.revision", "--revision")]
LoadFormat = Annotated[str | None, flag("model.load_format", "--load-format")]
Dtype = Annotated[str | None, flag("model.dtype", "--dtype")]
WeightPrecision = Annotated[str | None, flag("model.weight_precision", "--weight-precision")]
MaxModelLen = Annotated[str | None, flag("model.max_model_len", "--max-model-len")]
Host = Annotated[str | None, flag("server.host", "--host")]
Port = Annotated[str | None, flag("server.port", "--port", "-p")]
ApiKey = Annotated[str | None, flag("server.api_key", "--api-key")]
ServerKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Of the server at --url; else server.api_key of the settings.", show_default=False),
]
Device = Annotated[str | None, flag("engine.device", "--device")]
OverlapDepth = Annotated[str | None, flag("engine.overlap_depth", "--overlap-depth")]
Deterministic = Annotated[bool | None, flag("engine.deterministic", "--deterministic/--no-deterministic")]
Threads = Annotated[str | None, flag("engine.threads", "--threads")]
Policy = Annotated[str | None, flag("scheduler.policy", "--scheduler")]
Speculative = Annotated[str | None, flag("speculative.method", "--speculative")]
SpeculativeModel = Annotated[str | None, flag("speculative.model", "--speculative-model")]
SpeculativeK = Annotated[str | None, flag("speculative.k", "--speculative-k", "--k")]
SyntheticAcceptance = Annotated[str | None, flag("speculative.synthetic_acceptance", "--synthetic-acceptance")]
KVDtype = Annotated[str | None, flag("kv.dtype", "--kv-dtype", "--kv-cache-dtype")]
KVMemory = Annotated[str | None, flag("kv.memory", "--kv-memory")]
Role = Annotated[str | None, flag("disaggregation.role", "--role")]
LogLevel = Annotated[str | None, flag("log.level", "--log-level")]


def speculation(method: str | None, model: str | None, k: str | None, synthetic: str | None = None) -> dict[str, Any]:
    """What the flags of speculation got, as overrides for `load`."""
    given = {"method": method, "model": model, "k": k, "synthetic_acceptance": synthetic}
    return {f"speculative.{name}": value for name, value in given.items()}


def load(
    config_file: Path | ConfigFile | None = None,
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    every_plugin: bool = False,
) -> Loaded:
    """File < environment < command line, where `--set` beats named flags. Raises `ConfigError`.

    `overrides`: dotted key → what the flag got, None where it was not given. `sets`: `key=value` each.
    `every_plugin`: import also plugins that were given no settings, to show theirs.
    """
    from fluentllm.core.config import every_struct, installed_structs, load as load_settings

    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    given |= parse_sets(sets)
    named = {key: f"command line, {_FLAGS.get(key, '--' + key.rpartition('.')[2].replace('_', '-'))}" for key in given}
    named |= {key: f"command line, --set {key}" for key in parse_sets(sets)}
    environ = os.environ if environ is None else environ
    structs = every_struct if every_plugin else installed_structs
    return load_settings(config_file, given, environ, named=named, structs=structs)


def parse_sets(sets: Sequence[str] | None) -> dict[str, str]:
    """`key=value` each → key → value. Raises `ConfigError`."""
    given = {}
    for text in sets or ():
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {text!r} is not of the form KEY=VALUE.", fix="Type for instance: --set server.port=8001")
        given[key.strip()] = value
    return given


def plugin_lists(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> PluginSettings:
    """The allow and deny lists that a command line leads to, before it is parsed: plugins add commands to the parser, and
    a denied one must not be imported for that."""
    from fluentllm.core.config import load_lists

    environ = os.environ if environ is None else environ
    file = environ.get(CONFIG_VARIABLE) or None
    sets = []
    for flag_text, value in zip(arguments, [*arguments[1:], ""], strict=False):  # both empty for `fluent` alone
        name, separator, attached = flag_text.partition("=")
        if name in ("--config", "-c"):
            file = attached if separator else value
        elif name == "--set":
            sets.append(attached if separator else value)
    lists = {key: value for key, value in parse_sets(sets).items() if key in ("plugins.allow", "plugins.deny")}
    return load_lists(file, lists, environ)
