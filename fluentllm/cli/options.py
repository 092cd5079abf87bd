"""The one place where the command line becomes settings: `--config`, `--set key=value` and named flags.

A command that starts an engine names groups of flags, and gets settings:

    @options.configured(options.ENGINE)
    def latency(settings: Settings, batch: ... = "1,8,32") -> None:

Others declare the few flags that they have with the types below, and hand what they got to `load`. A flag that was not given
is None and overrides nothing. Help texts come from `core/settings.py`. Modules that use these types must import this module at
run time, since annotations of flags are evaluated.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluentllm.core.config.tree import Setting, settings_tree
from fluentllm.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
    return typer.Option(*names, help=_help(key), show_default=False, rich_help_panel=_panel(key))


def argument(key: str, name: str) -> Any:
    """A positional argument for the setting."""
    _FLAGS[key] = name
    return typer.Argument(metavar=name, help=_help(key), show_default=False)


def _panel(key: str) -> str:
    return f"Settings: {key.partition('.')[0]}"


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
ServerKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Of the server at --url; else server.api_key of the settings.", show_default=False),
]
Device = Annotated[str | None, flag("engine.device", "--device")]

Flags = dict[str, tuple[str, ...]]
"""Dotted key → its flags, the first of which names the command's parameter; none: a positional argument."""

ENGINE: Flags = {
    "model.name": (),
    "model.load_format": ("--load-format",),
    "model.dtype": ("--dtype",),
    "model.weight_precision": ("--weight-precision",),
    "model.max_model_len": ("--max-model-len",),
    "model.revision": ("--revision",),
    "engine.device": ("--device",),
    "engine.overlap_depth": ("--overlap-depth",),
    "engine.deterministic": ("--deterministic/--no-deterministic",),
    "engine.threads": ("--threads",),
    "scheduler.policy": ("--scheduler",),
    "kv.dtype": ("--kv-dtype", "--kv-cache-dtype"),
    "kv.memory": ("--kv-memory",),
    "speculative.method": ("--speculative",),
    "speculative.model": ("--speculative-model",),
    "speculative.k": ("--speculative-k", "--k"),
    "speculative.synthetic_acceptance": ("--synthetic-acceptance",),
    "log.level": ("--log-level",),
}
SERVED: Flags = {"model.served_name": ("--served-name",), "disaggregation.role": ("--role",)}
HTTP: Flags = {"server.host": ("--host",), "server.port": ("--port", "-p"), "server.api_key": ("--api-key",)}


def configured(*groups: Flags) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with these flags, `--config` and `--set`, which gets what they say as its parameter `settings`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = {key: _setting(key, names) for group in groups for key, names in group.items()}
        # The others are evaluated; what this one is, is known here, so that no command need import it.
        command.__annotations__.pop("settings")
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "settings"
        ]

        def run(config: Path | None, sets: list[str] | None, **given: Any) -> None:
            chosen = {key: given.pop(parameter.name) for key, parameter in flags.items()}
            command(load(config, chosen, sets).settings, **given)

        parameters = [*own, *flags.values(), _parameter("config", Config), _parameter("sets", Sets)]
        # What Typer reads of a command.
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _setting(key: str, names: tuple[str, ...]) -> inspect.Parameter:
    if not names:
        name = key.partition(".")[0]
        return _parameter(name, Annotated[str | None, argument(key, name.upper())])
    on, switch, _ = names[0].partition("/")
    return _parameter(on.strip("-").replace("-", "_"), Annotated[(bool if switch else str) | None, flag(key, *names)])


def _parameter(name: str, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


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
