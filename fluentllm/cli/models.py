"""`fluent models list | pull NAME | show NAME`: what can be served, what is here, what is inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msgspec import Struct

    from fluentllm.hub import ModelFiles

app = typer.Typer(no_args_is_help=True, help="Models: what is known, what is in the cache, what is inside one.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="models")


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Models known by name, and those in the Hugging Face hub's cache. Touches no network."""
    from fluentllm.hub.describe import known_models

    known = known_models()
    if as_json:
        _print_json(known)
        return
    width = max(len(model.name) for model in known)
    for model in known:
        size = _size(model.bytes) if model.bytes is not None else ""
        where = model.path if model.cached else f"not here yet: `fluent models pull {model.name}`"
        typer.echo(f"{model.name:{width}}  {size:>9}  {where}")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A default's name or a Hugging Face id.")],
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a model into the cache and print where it is; an id is brought up to date."""
    from fluentllm.hub import resolve

    files = resolve(name, revision, refresh=True)
    if as_json:
        _print_json({"name": files.name, "path": str(files.path), "kind": files.kind})
    else:
        typer.echo(files.path)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A default's name, a folder, a .gguf file or a Hugging Face id.")],
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Architecture, sizes, tokenizer, and whether a plugin can run it. Of an id not in the cache, fetches no weights."""
    import msgspec

    from fluentllm.hub import resolve
    from fluentllm.hub.describe import describe

    files = resolve(name, revision, weights=False)
    about = describe(files)
    plugin, reason = _runs_it(files, about.architecture)
    if as_json:
        _print_json(msgspec.to_builtins(about) | {"plugin": plugin, "unsupported_because": reason})
        return
    rows = {
        "model": about.name,
        "path": about.path,
        "architecture": about.architecture,
        "runs with": plugin if reason is None else f"nothing here: {reason}",
        "layers": about.layers,
        "hidden size": about.hidden_size,
        "heads": f"{about.heads} ({about.kv_heads} for keys and values)" if about.kv_heads != about.heads else about.heads,
        "vocabulary": about.vocab_size,
        "context": f"{about.context} tokens" if about.context is not None else None,
        "parameters": f"{about.parameters:,}" if about.parameters is not None else "no weights here",
        "size": _size(about.bytes),
        "format": f"{about.format}, {about.quantization}" if about.quantization else about.format,
        "tokenizer": about.tokenizer or "none",
        "chat template": "yes" if about.chat_template else "no",
    }
    width = max(map(len, rows))
    for label, value in rows.items():
        if value is not None:
            typer.echo(f"{label:{width}}  {value}")


def _runs_it(files: ModelFiles, architecture: str) -> tuple[str | None, str | None]:
    """The plugin that runs the model, or the reason why none does."""
    from fluentllm.core.errors import FluentError
    from fluentllm.core.plugins import PluginManager
    from fluentllm.hub import load_config

    models = PluginManager.load({"cli"}).registry("models")
    if architecture not in models:
        return None, f"no plugin knows {architecture}; known are {', '.join(models.names()) or 'none'}"
    entry = models.get(architecture)
    try:
        entry.factory.spec(load_config(files))
    except FluentError as error:
        return entry.plugin, str(error)
    return entry.plugin, None


def _size(count: int) -> str:
    from fluentllm.hub.progress import megabytes

    return megabytes(count)


def _print_json(value: Sequence[Struct] | dict[str, object]) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
