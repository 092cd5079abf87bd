"""`fluent dynamo [MODEL]`: settings as for `fluent serve`, and where Dynamo finds the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ConfigError
from . import options

if TYPE_CHECKING:
    from ..core.settings import Settings


@options.configured(options.ENGINE, options.SERVED)
def dynamo(
    settings: Settings,
    namespace: Annotated[str, typer.Option(help="Dynamo's namespace, the same for all workers of a model.")] = "dynamo",
    pull: Annotated[
        bool,
        typer.Option("--pull", help="Prefill: the prompt waits for decode, instead of going there while it is computed."),
    ] = False,
    discovery: Annotated[
        str, typer.Option(help="Dynamo's discovery backend: etcd, file, kubernetes, mem.", envvar="DYN_DISCOVERY_BACKEND")
    ] = "etcd",
) -> None:
    """Serve a model as a worker of Dynamo. Requests come from Dynamo's front end: this process listens for no clients."""
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
