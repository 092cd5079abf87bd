"""The first process of a server: takes the port, finds the model, starts engine and front end, keeps them alive. No torch.

    serve(settings)   # blocks until SIGINT or SIGTERM

What the engine is doing it tells the front end over the control line, whenever it changes; that the engine is ready, and
that it went away, the front end sees sooner by its own connection (`frontend/client.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from typing import TYPE_CHECKING

from fluentllm.core.timeline import Timeline
from fluentllm.hub.files import resolve, resolve_draft

from .banner import banner
from .child import LOG_FORMAT
from .control import EngineIs, EngineState
from .listen import bind, listen, url_of
from .runtime import RuntimeFolder
from .service import Service

if TYPE_CHECKING:
    import socket

    from fluentllm.core.settings import Settings
    from fluentllm.hub.files import ModelFiles

    from .control import Up

log = logging.getLogger("fluentllm.supervisor")

KILL_GRACE = 5.0
"""Seconds that a child gets on top of `server.shutdown_timeout` before it is killed."""


def serve(settings: Settings) -> None:
    """Serve until a signal says stop. Raises `ConfigError`, `ModelNotFound`, `ServiceFailed`."""
    timeline = Timeline("supervisor")
    logging.basicConfig(level=settings.log.level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    with bind(settings.server) as public:
        model = settings.model
        with timeline.stage("model files"):
            files = resolve(model.name, model.revision, weights=model.load_format != "dummy")
            # What is to be fetched is fetched here, once: the engine finds it in the cache.
            resolve_draft(settings.speculative.model, model.name, settings.speculative.method)
        listen(public, settings.server)
        asyncio.run(Supervisor(settings, files, public, timeline).run())


class Supervisor:
    def __init__(self, settings: Settings, files: ModelFiles, public: socket.socket, timeline: Timeline) -> None:
        """`timeline`: of this start, for the banner."""
        self._settings = settings
        self._files = files
        self._public = public
        self._timeline = timeline
        self._state: EngineState = "starting"
        self._stop = asyncio.Event()
        self._welcomed = False

    async def run(self) -> None:
        """Until a signal, or until a child cannot be kept alive: raises `ServiceFailed` then."""
        self._install_signals()
        runtime = RuntimeFolder.create()
        try:
            runtime.write_start(self._settings, self._files, self._timeline.origin)
            await self._supervise(runtime)
        finally:
            runtime.remove()

    async def _supervise(self, runtime: RuntimeFolder) -> None:
        limit = self._settings.engine.max_restarts
        self._engine = Service(
            "engine",
            "fluentllm.processes.engine",
            runtime,
            max_restarts=limit,
            on_up=self._engine_up,
            on_down=lambda: self._engine_is("restarting"),
            on_progress=lambda line: say(f"engine: {line}"),
        )
        self._frontend = Service(
            "front end",
            "fluentllm.processes.frontend",
            runtime,
            max_restarts=limit,
            public=self._public,
            on_up=self._frontend_up,
            on_linked=self._welcome,
            on_down=lambda: None,
            on_progress=lambda line: say(f"front end: {line}"),
        )
        keepers = {asyncio.create_task(service.keep(), name=service.name) for service in (self._engine, self._frontend)}
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({*keepers, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                self._engine_is("failed")
            await self._end()
            await asyncio.gather(*keepers)
        finally:
            stopping.cancel()
            self._kill()
            await asyncio.wait(keepers)

    async def _end(self) -> None:
        """The front end first: its requests need the engine to finish. It closes the public socket too; as long as we held
        it, connections would wait for nobody instead of being refused."""
        grace = self._settings.server.shutdown_timeout + KILL_GRACE
        if self._stop.is_set():
            say("Stopping; running requests may finish. Once more to stop at once.")
        self._public.close()
        await self._frontend.stop(grace)
        await self._engine.stop(grace)

    # -------------------------------------------------------------------------------------------------------------- signals
    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._kill()
        self._stop.set()

    def _kill(self) -> None:
        self._frontend.kill()
        self._engine.kill()

    # --------------------------------------------------------------------------------------------------------------- events
    def _engine_is(self, state: EngineState) -> None:
        self._state = state
        self._frontend.tell(EngineIs(state))

    def _engine_up(self, up: Up) -> None:
        self._engine_is("ready")
        if self._welcomed:
            say(f"The engine is ready again (start {self._engine.generation}).")
        self._welcome()

    def _frontend_up(self, up: Up) -> None:
        self._frontend.tell(EngineIs(self._state))
        self._welcome()

    def _welcome(self) -> None:
        """The first time that everything is up, and the front end has reached the engine: a request would be answered."""
        engine, frontend = self._engine.up, self._frontend.up
        if self._welcomed or not self._frontend.linked or engine is None or frontend is None or engine.info is None:
            return
        if self._stop.is_set():
            return
        self._welcomed = True
        say(
            banner(
                url_of(self._public),
                engine.info,
                example=frontend.example,
                needs_key=self._settings.server.api_key is not None,
                seconds=self._timeline.now(),
                startup=[*self._timeline.stages, *frontend.startup, *engine.info.startup],
            )
        )


def say(text: str) -> None:
    """To the user. That nobody listens any more stops no server."""
    with contextlib.suppress(OSError):
        print(text, flush=True)
