"""`fluent dynamo [MODEL]`: settings as for `fluent serve`, and where Dynamo finds the worker."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import ConfigError
from . import options


def dynamo(
    model: options.Model = None,
    namespace: Annotated[str, typer.Option(help="Dynamo's namespace, the same for all workers of a model.")] = "dynamo",
    pull: Annotated[
        bool,
        typer.Option("--pull", help="Prefill: the prompt waits for decode, instead of going there while it is computed."),
    ] = False,
    discovery: Annotated[
        str, typer.Option(help="Dynamo's discovery backend: etcd, file, kubernetes, mem.", envvar="DYN_DISCOVERY_BACKEND")
    ] = "etcd",
    role: options.Role = None,
    load_format: options.LoadFormat = None,
    served_name: options.ServedName = None,
    deterministic: options.Deterministic = None,
    threads: options.Threads = None,
    kv_memory: options.KVMemory = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Serve a model as a worker of Dynamo. Requests come from Dynamo's front end: this process listens for no clients."""
    given = {
        "model.name": model,
        "disaggregation.role": role,
        "model.load_format": load_format,
        "model.served_name": served_name,
        "engine.deterministic": deterministic,
        "engine.threads": threads,
        "kv.memory": kv_memory,
    }
    settings = options.load(config, given, sets).settings
    try:
        from ..dynamo.worker import run
    except ImportError as error:
        raise ConfigError(
            f"Dynamo cannot be imported: {error}.",
            fix="pip install ai-dynamo-runtime==1.6.1 pyzmq && pip install --no-deps ai-dynamo==1.6.1",
        ) from error
    run(settings, namespace=namespace, pull=pull, discovery=discovery)


def register(app: typer.Typer) -> None:
    app.command()(dynamo)
