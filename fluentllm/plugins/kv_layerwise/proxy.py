"""`fluent proxy`: the small router in front of prefill and decode engines, to try them by hand."""

from __future__ import annotations

from typing import Annotated

import typer

TIMEOUT = 600.0
QUEUE = 4096


def proxy_command(
    prefill: Annotated[list[str], typer.Option(help="URL of a prefill engine; may be given several times.")],
    decode: Annotated[list[str], typer.Option(help="URL of a decode engine; may be given several times.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[str | None, typer.Option(help="The engines' server.api_key.", envvar="FLUENT_SERVER__API_KEY")] = None,
    pull: Annotated[bool, typer.Option("--pull", help="Prefill first, then decode, instead of both at once.")] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds within which an answer must have begun, whatever is tried for it.", min=0.001)
    ] = TIMEOUT,
    queue: Annotated[int, typer.Option(help="Requests that may wait while no decode engine is up.", min=0)] = QUEUE,
) -> None:
    """Route completions to prefill and decode engines, one of each a request. For trying it by hand: whoever reaches it needs
    no key of their own."""
    import uvicorn

    from .router import create_app

    app = create_app(prefill, decode, api_key=api_key, pull=pull, timeout=timeout, queue=queue)
    uvicorn.run(app, host=host, port=port, log_level="info")
