"""`fluent config show|schema|explain`: what the settings are, what they could be, and where each came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options, output

if TYPE_CHECKING:
    from fluentllm.core.config.describe import Explanation

SECRETS = ("api_key", "key", "token", "secret", "password")
"""Settings of these names, or ending in `_` and one of them, are not printed."""

app = typer.Typer(help="Show and explain the settings.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="config")


@app.command()
def show(
    config: options.Config = None,
    sets: options.Sets = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what was given somewhere.", show_default=False)] = False,
    json: output.Json = False,
) -> None:
    """Print every setting with its value and where it came from."""
    from fluentllm.core.config.describe import explain

    rows = explain("", options.load(config, sets=sets, every_plugin=True))
    rows = [row for row in rows if not changed or row.origin != "default"]
    if json:
        output.print_json({row.key: {"value": _shown(row), "origin": row.origin} for row in rows})
    else:
        output.print_table(("setting", "value", "from"), [(row.key, output.text(_shown(row)), row.origin) for row in rows])


@app.command()
def schema(
    form: Annotated[Literal["json", "markdown"], typer.Option("--format", help="JSON Schema, or tables for people.")] = "json",
) -> None:
    """Print the JSON Schema of a config file, plugins' settings included."""
    from fluentllm.core.config import describe
    from fluentllm.core.plugins import PluginManager

    structs = PluginManager.load(None).config_structs()
    if form == "json":
        output.print_json(describe.schema(structs))
    else:
        typer.echo(describe.markdown(structs))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A setting or a section, such as server.port or server.")],
    config: options.Config = None,
    sets: options.Sets = None,
    json: output.Json = False,
) -> None:
    """Say what a setting is, its value, and where that came from."""
    from fluentllm.core.config import describe
    from fluentllm.core.config.sources import environment_name

    rows = describe.explain(key, options.load(config, sets=sets, every_plugin=True))
    if json:
        output.print_json([{**row.as_dict(), "value": _shown(row)} for row in rows])
        return
    for row in rows:
        typer.echo(f"{row.key}: {row.help}")
        typer.echo(f"  type     {row.type}{f', in {row.unit}' if row.unit else ''}")
        typer.echo(f"  default  {'none: it must be given' if row.required else output.text(row.default)}")
        typer.echo(f"  value    {output.text(_shown(row))} (from: {row.origin})")
        typer.echo(f"  set by   file: {row.key}; environment: {environment_name(row.key)}; command line: --set {row.key}=…")


def _shown(row: Explanation) -> Any:
    name = row.key.rpartition(".")[2]
    secret = any(name == word or name.endswith(f"_{word}") for word in SECRETS)
    return "(hidden)" if secret and row.value is not None else row.value
