"""The executor: applies a plan to the slot tables, launches the step programs, brings back what they produced.

It owns the device. It knows plans, streams and buffers, and not what is inside a program: the programs are injected
(`fluentllm.step`). Launches happen on one thread of its own, in order, so the engine's loop never waits for the device and
what a step writes is seen by the next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from .preparation import Program
from .sequence import features_of
from .slots import SlotTables
from .types import Drafting, SlotResult, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Host mirror of who was in each slot when a step was launched."""

    generations: tuple[int, ...]
    logprobs: tuple[int | None, ...]


class Pending(Protocol):
    """What a launched program leaves, on its way to the host."""

    def read(self, rows: SlotRows) -> list[SlotResult]:
        """What was copied to the host; called once the step has finished."""
        ...


class Programs(Protocol):
    rehearses: bool
    """Are steps run to see what memory they take?"""
    drafting_error: str | None
    """Why nothing is drafted any more; None while all is well."""
    verified: int
    """Drafts of each slot that the last decode program computed."""

    def run(self, plan: StepPlan) -> list[Pending]: ...

    def prepare(self, bucket: int, drafting: Drafting, features: int) -> bool:
        """Let the program of such decode steps run once, for nobody, unless it is ready. → is it?"""
        ...


class Executor:
    """Runs plans over one device's slot tables."""

    def __init__(self, programs: Programs, tables: SlotTables, *, threads: int | None = None) -> None:
        self.programs = programs
        self.tables = tables
        self.device = tables.device
        self._rows = SlotRows((0,) * (tables.slots + 1), (None,) * (tables.slots + 1))
        # Pinned memory that is let go has an event recorded on the stream that wrote it. If the reader were the last to let
        # go, that could fall into a capture on that stream: so the launch thread is, some steps later.
        self._kept: deque[list[Pending]] = deque(maxlen=8)
        self._launcher = ThreadPoolExecutor(1, "fluent-launch", initializer=_initialise_thread, initargs=(self.device, threads))
        # Reading back waits for the device, so on a GPU it must not keep the next step from being launched.
        self._reader = ThreadPoolExecutor(1, "fluent-read", initializer=_initialise_thread, initargs=(self.device, threads))
        # Each makes its stream now: the device refuses that while a program is captured on the other's.
        for pool in (self._launcher, self._reader):
            pool.submit(int).result()

    def launch(self, plan: StepPlan) -> Future[StepResult]:
        """Enqueue a step. The future fails with what the step raised."""
        future: Future[StepResult] = Future()
        self._launcher.submit(self._guard(future, self._launch), plan, future)
        return future

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run something on the launch thread, between steps."""
        return self._launcher.submit(function)

    def prepare(self, program: Program) -> Future[bool]:
        """Let a program run once, for nobody. → is it ready?"""
        return self._launcher.submit(self._prepare, program)

    def close(self) -> None:
        self._launcher.shutdown(wait=True)
        self._reader.shutdown(wait=True)

    def _guard(self, future: Future[StepResult], function: Callable[..., None]) -> Callable[..., None]:
        """What fails on a thread must reach who waits."""

        def run(*args: Any) -> None:
            try:
                function(*args)
            except BaseException as error:
                future.set_exception(error)

        return run

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, future: Future[StepResult]) -> None:
        clock = _DeviceClock() if self.device.type == "cuda" else _HostClock()
        self._apply(plan)
        began = time.perf_counter()
        pending = self.programs.run(plan)
        launched = time.perf_counter()
        self._kept.append(pending)
        done = StepResult(
            step=plan.step,
            slots=[],
            seconds=0.0,
            launching=launched - began if self.device.type == "cuda" else 0.0,
            verified=self.programs.verified,
            drafting_error=self.programs.drafting_error,
        )
        rows = self._rows
        clock.stop()
        if self.device.type == "cpu":
            self._read(done, pending, rows, clock, launched, future)
        else:
            self._reader.submit(self._guard(future, self._read), done, pending, rows, clock, launched, future)

    @torch.inference_mode()
    def _prepare(self, program: Program) -> bool:
        return self.programs.prepare(*program)

    def _apply(self, plan: StepPlan) -> None:
        """Admissions and page grants, before the programs of the same step, on their stream."""
        for load in plan.grammars:
            self.tables.load_grammar(load)
        if plan.admit:
            generations, logprobs = list(self._rows.generations), list(self._rows.logprobs)
            for init in plan.admit:
                self.tables.admit(init, features_of(init.params))
                generations[init.slot], logprobs[init.slot] = init.generation, init.params.logprobs
            self._rows = replace(self._rows, generations=tuple(generations), logprobs=tuple(logprobs))
        for masks in plan.masks:
            self.tables.mask(masks)
        if plan.grants:
            self.tables.grant(plan.grants)

    @torch.inference_mode()
    def _read(
        self,
        result: StepResult,
        pending: list[Pending],
        rows: SlotRows,
        clock: _HostClock | _DeviceClock,
        launched: float,
        future: Future[StepResult],
    ) -> None:
        """Fill in what the device has brought."""
        result.seconds = clock.seconds()
        result.behind = time.perf_counter() - launched if result.launching else 0.0
        result.slots = [slot for program in pending for slot in program.read(rows)]
        future.set_result(result)


class _HostClock:
    """Seconds of a step that ran on the calling thread."""

    def __init__(self) -> None:
        self._started = self._stopped = time.perf_counter()

    def stop(self) -> None:
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        return self._stopped - self._started


class _DeviceClock:
    """Seconds that the device took, between two points of the current stream; waiting in the queue does not count."""

    def __init__(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stopped = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._started.record()

    def stop(self) -> None:
        self._stopped.record()

    def seconds(self) -> float:
        """Waits until the device has come past the end."""
        self._stopped.synchronize()
        return float(self._started.elapsed_time(self._stopped)) / 1e3


def _initialise_thread(device: torch.device, threads: int | None) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A stream of its own: the default one cannot be captured. What was loaded must be there first.
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    elif threads is not None:
        # OpenMP's pool belongs to the thread that opens the parallel region.
        torch.set_num_threads(threads)
