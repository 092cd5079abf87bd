"""The front end's process: HTTP on the public socket that it inherits, tokenizers, a client of the engine. No torch.

    python -m fluentllm.processes.frontend --runtime DIR --generation N --control-fd F --listen-fd S

SIGTERM takes no more connections and lets running requests finish within `server.shutdown_timeout`; what runs longer ends
with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from fluentllm.core.errors import EngineUnavailable
from fluentllm.core.plugins.burden import LateTorch
from fluentllm.frontend.app import create_app
from fluentllm.frontend.client import SocketEngineClient
from fluentllm.frontend.http import HttpProtocol
from fluentllm.frontend.services import Services
from fluentllm.settling import settle

from .child import Child, run
from .control import Linked, Up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fluentllm.core.plugins import PluginManager

    from .control import EngineState, Example


FAREWELL = 1.0
"""Seconds on top of `server.shutdown_timeout` to tell clients that their requests were not done; then connections are cut."""


class Server(uvicorn.Server):
    """uvicorn, with the signals left to us: its own handlers end the process before the client is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop() -> None:
            self.should_exit = True
            self.on_stop()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.on_started()

    def on_started(self) -> None: ...

    def on_stop(self) -> None: ...


async def serve(child: Child, plugins: PluginManager) -> None:
    """Until SIGTERM."""
    client = SocketEngineClient(child.runtime.engine_socket)
    with child.timeline.stage("tokenizer"):
        formats = plugins.registry("answer_formats")
        services = Services.load(child.settings, client, child.files.path, child.files.name, formats)
    services.ledger = plugins.ledger
    loop = asyncio.get_running_loop()

    def told(state: EngineState) -> None:
        loop.call_soon_threadsafe(client.told, state)

    child.control.on_state(told)
    await client.start()
    patience = child.settings.server.shutdown_timeout

    def too_late() -> EngineUnavailable:
        return EngineUnavailable(
            f"The server stops, and the request was not done within server.shutdown_timeout, {patience:g} s.",
            fix="Send it to another server.",
        )

    config = uvicorn.Config(
        create_app(services, plugins.routes()),
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="debug" if child.settings.log.level == "debug" else "warning",  # it says little of use at info
        server_header=False,
        timeout_graceful_shutdown=patience + FAREWELL,  # type: ignore[arg-type]  # waits with wait_for
    )
    server = Server(config)
    stages = tuple(child.timeline.stages)
    up = Up(example=_example(services, plugins), startup=stages)
    server.on_started = lambda: child.up(up)  # type: ignore[method-assign]
    server.on_stop = lambda: loop.call_later(patience, client.give_up, too_late)  # type: ignore[method-assign,assignment]
    settle()
    linked = asyncio.create_task(_report_link(client, child))
    assert child.listen_fd is not None
    with socket.socket(fileno=child.listen_fd) as public:
        await server.serve(sockets=[public])
    linked.cancel()
    services.close()
    await client.close()


def _example(services: Services, plugins: PluginManager) -> Example | None:
    paths = {route.path for route in plugins.routes()}
    if services.generation.template is not None and "/v1/chat/completions" in paths:
        return "chat"
    return "text" if "/v1/completions" in paths else None


async def _report_link(client: SocketEngineClient, child: Child) -> None:
    await client.wait_ready()
    child.control.send(Linked())


def main(child: Child) -> None:
    plugins = child.load_plugins({"frontend"})
    LateTorch(plugins.infos).install()
    uvloop.run(serve(child, plugins))


if __name__ == "__main__":
    run(main, "FluentLLM's front-end process; `fluent serve` starts it.", "front end")
