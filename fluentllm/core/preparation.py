"""What an engine does while it has nothing to do: it captures the decode programs that requests may need next.

A program that is new to a step stalls it, for 40 to 100 ms on a GPU: once for its first run, once more for its capture. So an
idle engine gives both to a step of nobody: all of its slots are padding, and what it computes goes nowhere. One run at a
time, so that a request which comes meanwhile waits for no more than that.

Which programs: those of the kinds of requests (`StepPlan.features`) that have run, the most usual first; of these the batches
that most steps had, then the others from small to large, since a burst passes through them; and of each batch every draft
length that a step may have. Torch-free.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from .buckets import bucket_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from .types import Drafting, StepPlan

log = logging.getLogger(__name__)

MOST = 128
"""Programs that are captured ahead: of those that are kept (`graphs.MOST`) some are passes over prompts, of 25 sizes."""
REST, BREATH = 1.0, 0.02
"""Seconds without work before the first run, and from one to the next: whoever comes then is seen first."""


class Program(NamedTuple):
    """A decode program, as `Programs.prepare` takes it."""

    bucket: int
    drafting: Drafting
    features: int


class Preparation:
    """Fed by the engine with what it launches."""

    def __init__(self, prepare: Callable[[Program], Future[bool]], slots: int, drafting: Sequence[Drafting]) -> None:
        """prepare: lets a program run once, for nobody; is it ready then? slots: the largest batch. drafting: every draft
        length that a step may have, the likeliest first; none for an engine that captures nothing ahead."""
        self._prepare = prepare
        self._buckets = sorted({bucket_of(batch) for batch in range(1, slots + 1)})
        self._drafting = drafting
        self._seen: Counter[int] = Counter()
        """Steps by features."""
        self._batches: dict[int, Counter[int]] = defaultdict(Counter)
        """Of each, steps by bucket."""
        self._ready: set[Program] = set()

    def saw(self, plan: StepPlan) -> None:
        """It was launched."""
        if plan.decode:
            self._seen[plan.features] += 1
            self._batches[plan.features][bucket_of(len(plan.decode))] += 1

    def start_over(self, drafting: Sequence[Drafting]) -> None:
        """What was captured is captured no more, and this is what a step may draft from now on."""
        self._drafting = drafting
        self._ready.clear()

    async def until(self, wake: asyncio.Event) -> None:
        """Capture one program after the other until `wake` is set, or nothing is left."""
        pause = REST
        while not wake.is_set() and (program := self.next()) is not None:
            try:
                await asyncio.wait_for(wake.wait(), pause)
            except TimeoutError:
                await self._run(program)
                pause = BREATH

    async def all(self, most: int) -> None:
        """Capture them for batches up to `most`, now: what a benchmark does that times an engine which could have been idle."""
        while (program := self.next(most)) is not None:
            await self._run(program)

    def next(self, most: int | None = None) -> Program | None:
        """The first that is not ready, of batches up to `most`."""
        largest = bucket_of(most) if most is not None else max(self._buckets, default=0)
        for features, _ in self._seen.most_common() if len(self._ready) < MOST else ():
            batches = self._batches[features]
            for bucket in sorted(self._buckets, key=lambda one: (-batches[one], one)):
                for drafting in self._drafting if bucket <= largest else ():
                    program = Program(bucket, drafting, features)
                    if program not in self._ready:
                        return program
        return None

    async def _run(self, program: Program) -> None:
        try:
            if await asyncio.wrap_future(self._prepare(program)):
                self._ready.add(program)
        except Exception:
            # What a step needs it captures itself.
            log.warning("nothing is captured ahead any more: %s failed", program, exc_info=True)
            self._buckets = []
