"""`fluent plugins list|show|trace|doctor`: which plugins there are, what they offer, what they cost, what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options, output
from .server import get_json

if TYPE_CHECKING:
    from fluentllm.core.plugins import PluginManager
    from fluentllm.core.plugins.discovery import PluginInfo
    from fluentllm.core.plugins.observers import Call

app = typer.Typer(help="List, show, trace and check plugins.", no_args_is_help=True)

EXIT_PROBLEMS = 1


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="plugins")


@app.command("list")
def list_plugins(config: options.Config = None, sets: options.Sets = None, json: output.Json = False) -> None:
    """Every installed plugin: name, version, source, hooks, state."""
    rows = [_describe(info) for info in _load(config, sets).infos]
    if json:
        output.print_json(rows)
        return
    columns = ("name", "state", "source", "version", "processes", "hooks")
    output.print_table(columns, [[_cell(row[column]) for column in columns] for row in rows])


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A plugin's name.")],
    config: options.Config = None,
    sets: options.Sets = None,
    json: output.Json = False,
) -> None:
    """All there is to know of one plugin: where it lies, what it offers, its settings, its time."""
    from fluentllm.core.config.tree import nearest
    from fluentllm.core.errors import PluginError

    manager = _load(config, sets)
    info = manager.info(name)
    if info is None:
        names = [other.name for other in manager.infos]
        meant = nearest(name, names)
        fix = f"Did you mean {meant!r}?" if meant else f"Installed: {', '.join(names)}."
        raise PluginError(f"No plugin is named {name!r}.", fix=fix)
    row = _describe(info) | {"offers": _offers(manager, info.name), "settings": _settings(manager, info.name)}
    row |= {"import_seconds": info.import_seconds, "calls": _calls(manager, info.name)}
    if json:
        output.print_json(row)
    else:
        output.print_table(("", ""), [(key, _cell(value)) for key, value in row.items() if value not in (None, [], {}, ())])


@app.command()
def trace(
    url: Annotated[str | None, typer.Option(help="A running server, such as http://127.0.0.1:8000.")] = None,
    api_key: options.ServerKey = None,
    config: options.Config = None,
    sets: options.Sets = None,
    json: output.Json = False,
) -> None:
    """Load every plugin and print each call into one, with its time; with --url, what the plugins of a running server were
    called for so far: how often, how long, and how often they failed.

    A server with `--set log.level=debug` logs every single call.
    """
    if url is not None:
        _trace_server(url, options.load(config, {"server.api_key": api_key}, sets).settings.server.api_key, json)
        return
    calls: list[Call] = []
    _load(config, sets, calls)
    if json:
        rows = [{"plugin": call.plugin, "hook": call.hook, "seconds": call.seconds, "error": call.error} for call in calls]
        output.print_json(rows)
        return
    table = [(call.plugin, call.hook, f"{call.seconds * 1e6:.1f} µs", call.error or "") for call in calls]
    output.print_table(("plugin", "call", "time", "error"), table)


def _trace_server(url: str, api_key: str | None, json: bool) -> None:
    report = get_json(url, "/plugins", api_key)
    if json:
        output.print_json(report)
        return
    table = []
    for process in ("frontend", "engine"):
        for row in report[process] or []:
            times = (f"{row['seconds'] * 1e3:.3f} ms", f"{row['longest'] * 1e3:.3f} ms")
            state = "" if row["enabled"] else "switched off"
            table.append((process, row["plugin"], row["hook"], str(row["calls"]), str(row["failures"]), *times, state))
    output.print_table(("process", "plugin", "call", "calls", "failures", "in all", "longest", ""), table)
    if report["engine"] is None:
        typer.echo("The engine is not ready.")


@app.command()
def doctor(config: options.Config = None, sets: options.Sets = None, json: output.Json = False) -> None:
    """Check every plugin: imports, hooks, names, stale entry points. Exits with 1 if something is wrong."""
    problems = find_problems(config, sets)
    if json:
        output.print_json(problems)
    else:
        for problem in problems:
            typer.echo(f"error: {problem['problem']}\nfix: {problem['fix']}")
        if not problems:
            typer.echo("All plugins are in order.")
    if problems:
        raise typer.Exit(EXIT_PROBLEMS)


def find_problems(config: Any = None, sets: Any = None) -> list[dict[str, str]]:
    """What is wrong with the installed plugins, each with what to do about it."""
    from fluentllm.core.errors import FluentError
    from fluentllm.core.plugins.burden import FIX
    from fluentllm.core.plugins.discovery import discover

    try:
        manager = _load(config, sets)
    except FluentError as error:
        return [{"problem": error.message, "fix": error.fix or "Uninstall it."}, *_stale(discover())]
    problems = _stale(manager.infos)
    for info in manager.infos:
        if info.state in ("failed", "missing"):
            fix = f"Mend or upgrade {info.distribution}, or add {info.name!r} to `plugins.deny`."
            problems.append({"problem": f"{info} is not loaded: {info.problem}", "fix": fix})
        elif info.burden is not None:
            problems.append({"problem": f"{info} is a burden: {info.burden}.", "fix": FIX})
    return problems


def _stale(infos: list[PluginInfo]) -> list[dict[str, str]]:
    from fluentllm.core.plugins.staleness import stale_entries

    return [{"problem": f"{item.distribution}: {item.difference}", "fix": item.fix} for item in stale_entries(infos)]


def _load(config: Any, sets: Any, calls: list[Call] | None = None) -> PluginManager:
    from fluentllm.core.plugins import PluginManager

    lists = options.load(config, sets=sets).settings.plugins
    trace = None if calls is None else calls.append
    return PluginManager.load(None, lists.allow, lists.deny, trace=trace, strict=False)


def _describe(info: PluginInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "version": info.version,
        "source": info.distribution,
        "builtin": info.builtin,
        "value": info.value,
        "file": info.file,
        "processes": list(info.processes) or ["all"],
        "hooks": list(info.hooks),
        "state": info.state,
        "problem": info.problem or info.burden,
    }


def _offers(manager: PluginManager, name: str) -> dict[str, list[str]]:
    from fluentllm.core.plugins import REGISTRIES

    offers = {kind: [entry.name for entry in manager.registry(kind) if entry.plugin == name] for kind in REGISTRIES}
    offers["routes"] = [f"{'|'.join(route.methods)} {route.path}" for route in manager.routes() if route.plugin == name]
    offers["calls"] = manager.calls_of(name)
    return {kind: names for kind, names in offers.items() if names}


def _settings(manager: PluginManager, name: str) -> list[str]:
    from fluentllm.core.config.tree import Section, settings_tree

    section = settings_tree(dict(manager.config_structs())).find(f"plugins.{name}")
    return [f"{leaf.key} ({leaf.type_name()})" for leaf in section.leaves()] if isinstance(section, Section) else []


def _calls(manager: PluginManager, name: str) -> dict[str, dict[str, float]]:
    return {
        hook: {"calls": stats.calls, "failures": stats.failures, "seconds": stats.seconds, "longest": stats.longest}
        for (plugin, hook), stats in manager.ledger.stats.items()
        if plugin == name
    }


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else output.text(value)
