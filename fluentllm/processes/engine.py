"""The engine's process: builds the engine that the settings ask for and serves it on the runtime folder's socket.

    python -m fluentllm.processes.engine --runtime DIR --generation N --control-fd F

SIGTERM drains: no new requests, the running ones may finish within `server.shutdown_timeout`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from typing import TYPE_CHECKING

import uvloop

from fluentllm.core import ipc
from fluentllm.core.errors import EngineUnavailable, OutOfMemory
from fluentllm.core.session import Session, refusal
from fluentllm.core.types import FromEngine, Generate, Outputs, RequestOutput, ToEngine
from fluentllm.hub.cache import keep_kernels
from fluentllm.settling import settle
from fluentllm.waiting import spin_briefly

from .child import Child, run
from .control import Progress, Up, die_with_parent
from .first_token import FirstToken
from .request_log import RequestLog
from .watchdog import Watchdog

if TYPE_CHECKING:
    from fluentllm.core.session import Engine

log = logging.getLogger("fluentllm.engine")


class Gate:
    """Who may bring requests; closed while the engine drains."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.draining = False
        self.clients: set[Client] = set()

    def accept(self, connection: ipc.Connection[ToEngine]) -> Client:
        client = Client(self, connection)
        self.clients.add(client)
        return client


class Client:
    """The engine's end of one connection."""

    def __init__(self, gate: Gate, connection: ipc.Connection[ToEngine]) -> None:
        self.connection = connection
        self._gate = gate
        self._session = Session(gate.engine, self.deliver)

    def received(self, message: ToEngine) -> None:
        if self._gate.draining and isinstance(message, Generate):
            stopping = EngineUnavailable("The engine is shutting down.", fix="Send the request to another server.")
            self.deliver(refusal(message.request.id, stopping))
        else:
            self._session.received(message)

    def lost(self, reason: str) -> None:
        log.debug("a client left: %s", reason)
        self._gate.clients.discard(self)
        self._session.close()

    def deliver(self, message: FromEngine) -> None:
        """Send; a step's outputs that are too large for one frame go in several, one that still is ends its request."""
        try:
            self.connection.send(message)
        except ipc.FrameTooLarge as error:
            if not isinstance(message, Outputs):
                raise
            self._deliver_split(message.outputs, error)

    def _deliver_split(self, outputs: list[RequestOutput], error: ipc.FrameTooLarge) -> None:
        if len(outputs) == 1:
            self._session.abort([outputs[0].id])
            self.connection.send(refusal(outputs[0].id, error))
            return
        half = len(outputs) // 2
        self.deliver(Outputs(outputs=outputs[:half]))
        self.deliver(Outputs(outputs=outputs[half:]))


async def serve(child: Child, engine: Engine, watchdog: Watchdog) -> None:
    """Until SIGTERM, or until the engine ends: what ended it is raised."""
    gate = Gate(engine)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    running = asyncio.create_task(engine.run(), name="engine")
    server = await ipc.serve(child.runtime.engine_socket, gate.accept, generation=child.generation)
    watchdog.start()
    settle()
    child.up(Up(info=engine.info))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        gate.draining = True
        await _idle(engine, running, child.settings.server.shutdown_timeout)
        engine.stop()
    await running
    if not stop.is_set():
        raise RuntimeError("the engine's loop ended without having been asked to")
    watchdog.stop()
    server.close()
    for client in list(gate.clients):
        client.connection.close()


async def _idle(engine: Engine, running: asyncio.Task[None], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while engine.has_work and not running.done() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def main(child: Child) -> None:
    die_with_parent()
    keep_kernels()
    spin_briefly()

    def tell(line: str) -> None:
        child.control.send(Progress(line))

    objects: dict[str, object] = {"first_token": FirstToken(child.timeline, tell)}
    if child.settings.log.requests:
        objects["request_log"] = RequestLog()
    plugins = child.load_plugins({"engine", "executor"}, objects)

    with child.timeline.stage("imports"):
        from torch import OutOfMemoryError

        from fluentllm.assembly import build_engine  # torch: seconds, so after what may refuse

    try:
        engine = build_engine(child.settings, child.files, plugins, tell, child.timeline)
    except (OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"The model does not fit: {error}.",
            fix="Free memory on the device, or lower model.max_model_len, scheduler.max_running or kv.memory.",
        ) from error
    watchdog = Watchdog(engine, child.settings.engine.hang_timeout, plugins.ledger)
    uvloop.run(serve(child, engine, watchdog))


if __name__ == "__main__":
    run(main, "FluentLLM's engine process; `fluent serve` starts it.", "engine")
