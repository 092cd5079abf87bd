"""`fluent models list | pull NAME | show NAME`: what can be served, what is here, what is inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, print_json, print_table

if TYPE_CHECKING:
    from fluentllm.hub import ModelFiles

app = typer.Typer(no_args_is_help=True, help="Models: what is known, what is in the cache, what is inside one.")

Name = Annotated[str, typer.Argument(help="A default's name, a folder, a .gguf file or a Hugging Face id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="models")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Models known by name, and those in the Hugging Face hub's cache. Touches no network."""
    from fluentllm.hub.describe import known_models

    known = known_models()
    if as_json:
        print_json(known)
        return
    rows = []
    for model in known:
        where = model.path if model.path is not None else f"not here yet: fluent models pull {model.name}"
        rows.append((model.name, _size(model.bytes), where))
    print_table(("model", "size", "where"), rows)


@app.command()
def pull(name: Name, revision: Revision = None, as_json: Json = False) -> None:
    """Fetch a model into the cache and print where it is; a Hugging Face id is brought up to date."""
    from fluentllm.hub import resolve

    files = resolve(name, revision, refresh=True)
    if as_json:
        print_json({"name": files.name, "path": str(files.path), "kind": files.kind})
    else:
        typer.echo(files.path)


@app.command()
def show(name: Name, revision: Revision = None, as_json: Json = False) -> None:
    """Architecture, sizes, tokenizer, whether a plugin can run it. Of a Hugging Face id no weights are fetched."""
    import msgspec

    from fluentllm.hub import resolve
    from fluentllm.hub.describe import describe

    files = resolve(name, revision, weights=False)
    about = describe(files)
    plugin, reason = _runs_it(files, about.architecture)
    if as_json:
        print_json(msgspec.to_builtins(about) | {"plugin": plugin, "unsupported_because": reason})
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
