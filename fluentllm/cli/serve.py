"""`fluent serve [MODEL]`: settings from the command line, then the supervisor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from . import options

if TYPE_CHECKING:
    from ..core.settings import Settings


@options.configured(options.ENGINE, options.SERVED, options.HTTP)
def serve(settings: Settings) -> None:
    """Serve a model over HTTP, with OpenAI's API. Without MODEL: the small default model, fetched at the first start.

    Every flag is a setting of the config file too; `fluent config schema` lists them all.
    """
    from fluentllm.processes.supervisor import serve as serve_forever

    serve_forever(settings)


def register(app: typer.Typer) -> None:
    app.command()(serve)
