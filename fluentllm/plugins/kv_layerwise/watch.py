"""Follows prefill passes on the launch thread: how far the KV of each chunk is written.

On a CPU a layer is written when the backend's call returns. On a GPU it is enqueued then: an event recorded behind it on the
stream is waited for by a thread of its own, which blocks in the driver and polls nothing; the launch thread never waits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...core.types import StepPlan


@dataclass(slots=True)
class Progress:
    """Of one chunk; written by one thread, read by the engine's loop."""

    layers: int = 0
    """Leading layers of the target that are written."""
    ended: bool = False
    """And the draft layers and page states."""


class Watch:
    """`core.handoff.PassWatcher` for a CPU."""

    def __init__(self, advanced: Callable[[], None], passed: Callable[[float, int], None]) -> None:
        """advanced: called from any thread when some progress is worth a look; passed: seconds and prompt tokens of a pass."""
        self.group = 1
        """Layers between two calls of `advanced`."""
        self._advanced, self._passed = advanced, passed
        self._passes: dict[int, list[Progress]] = {}
        self._now: list[Progress] = []
        self._told = 0
        self._layers = 0
        self._tokens = 0
        self._started: Any = None

    def expect(self, step: int, progress: list[Progress]) -> None:
        """Before the step is launched."""
        self._passes[step] = progress

    def begin(self, plan: StepPlan) -> None:
        self._now = self._passes.pop(plan.step, [])
        self._told = self._layers = 0
        self._tokens = sum(chunk.count for chunk in plan.prefill)
        if self._now:
            self._started = self._mark()

    def layer(self, layer: int) -> None:
        self._layers = layer + 1
        if self._now and self._layers - self._told >= self.group:
            self._told = self._layers
            self._reached(self._now, self._layers, False)

    def end(self) -> None:
        if self._now:
            self._reached(self._now, self._layers, True)
        self._now = []

    def close(self) -> None:
        """No pass follows."""

    def _mark(self) -> Any:
        """This moment of the pass."""
        return time.perf_counter()

    def _reached(self, progress: list[Progress], layers: int, ended: bool) -> None:
        self._tell(progress, layers, ended)
        if ended:
            self._passed(time.perf_counter() - self._started, self._tokens)

    def _tell(self, progress: list[Progress], layers: int, ended: bool) -> None:
        for chunk in progress:
            chunk.layers, chunk.ended = layers, ended
        self._advanced()


class StreamWatch(Watch):
    """For CUDA."""

    def __init__(self, advanced: Callable[[], None], passed: Callable[[float, int], None]) -> None:
        super().__init__(advanced, passed)
        self._events: queue.SimpleQueue[tuple[Any, list[Progress], int, tuple[Any, int] | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="kv-layers", daemon=True)
        self._thread.start()

    def _mark(self) -> Any:
        import torch

        # blocking: the waiting thread sleeps in the driver instead of spinning. Timed by the stream: when the launch thread
        # is through with a pass, the device may not have begun it.
        event = torch.cuda.Event(blocking=True, enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _reached(self, progress: list[Progress], layers: int, ended: bool) -> None:
        self._events.put((self._mark(), progress, layers, (self._started, self._tokens) if ended else None))

    def _wait(self) -> None:
        while (item := self._events.get()) is not None:
            event, progress, layers, whole = item
            event.synchronize()
            self._tell(progress, layers, whole is not None)
            if whole is not None:
                started, tokens = whole
                self._passed(started.elapsed_time(event) / 1e3, tokens)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(timeout=5)
