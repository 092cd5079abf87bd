"""An engine in this process: the loop of `fluent serve`'s engine on a thread of its own, with the front end's text half on it.

What `LLM`, `fluent run`, `fluent chat` and `fluent bench` run on. It works where an event loop runs already (a notebook).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .core.errors import EngineUnavailable

if TYPE_CHECKING:
    from types import TracebackType

    from .core.engine import Engine
    from .core.plugins import PluginManager
    from .core.settings import Settings
    from .frontend.client import LocalEngineClient
    from .frontend.generation import Generation
    from .hub import ModelFiles

T = TypeVar("T")


class LocalEngine:
    """`with LocalEngine(settings) as local: local.call(local.generation.complete(job))`

    Raises what loading the model raises. Everything async runs on the engine's own loop, so `generation` and `client` may be
    used through `call` only, from any thread.
    """

    engine: Engine
    generation: Generation

    def __init__(self, settings: Settings, progress: Callable[[str], None] | None = None) -> None:
        """`progress` gets a line for each stage of loading."""
        from .core.config import bind
        from .core.plugins import PluginManager
        from .core.timeline import Timeline
        from .hub import resolve
        from .hub.cache import keep_kernels
        from .waiting import spin_briefly

        keep_kernels()
        spin_briefly()
        self.timeline = Timeline("engine")
        with self.timeline.stage("plugins"):
            plugins = PluginManager.load({"engine", "executor"}, settings.plugins.allow, settings.plugins.deny)

        self.settings = bind(settings, plugins.config_structs())
        with self.timeline.stage("model files"):
            self.files: ModelFiles = resolve(
                settings.model.name, revision=settings.model.revision, weights=settings.model.load_format != "dummy"
            )
        self._loop = _new_loop()
        self._others: list[LocalEngineClient] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="fluent-engine", daemon=True)
        self._thread.start()
        try:
            self.call(self._start(plugins, progress))
        except BaseException:
            self._stop_loop()
            raise

    @property
    def model_name(self) -> str:
        return self.engine.info.name

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it; an interrupt cancels it. Raises `EngineUnavailable` once
        closed."""
        if self._loop.is_closed():
            coroutine.close()
            raise EngineUnavailable("The engine is closed.", fix="Make a new one.")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def connect(self) -> LocalEngineClient:
        """A client for the running event loop, which is another than the engine's."""
        from .frontend.client import LocalEngineClient

        client = LocalEngineClient(self.engine, self._loop)
        self._others.append(client)
        return client

    def close(self) -> None:
        """Abort what runs, and free the model."""
        if self._thread.is_alive():
            self.call(self._stop())
            self._stop_loop()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _start(self, plugins: PluginManager, progress: Callable[[str], None] | None) -> None:
        with self.timeline.stage("imports"):
            from .assembly import build_engine
            from .frontend.client import LocalEngineClient
            from .frontend.services import Services

        self.engine = build_engine(self.settings, self.files, plugins, progress, self.timeline)
        self._client = LocalEngineClient(self.engine)
        with self.timeline.stage("tokenizer"):
            self._services = Services.load(self.settings, self._client, self.files.path, self.files.name)
        self.generation = self._services.generation
        self._running = asyncio.create_task(self._run(), name="engine")

    async def _run(self) -> None:
        try:
            await self.engine.run()
        except Exception as error:
            for client in (self._client, *self._others):
                client.stopped(f"{type(error).__name__}: {error}")
            raise

    async def _stop(self) -> None:
        self._client.close()
        self._services.close()
        self.engine.stop()
        await asyncio.gather(self._running, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
