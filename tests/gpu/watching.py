"""What the host asks of CUDA in each step, and when the device is busy, as the profiler saw some steady steps."""

from __future__ import annotations

import asyncio
import re
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fluentllm.core.types import Request, SamplingParams
from fluentllm.local import LocalEngine

STEP = "fluent step"
WARM = 12
"""Steps before the first look: eager, captured, replayed, for each number of drafts."""


_CALL = re.compile(r"cu(da)?[A-Z]\w*")
_WAITS = re.compile(
    r"cu(da)?("
    r"(Device|Thread|Stream|Event|Ctx)Synchronize"
    r"|Memcpy(?!\w*Async)\w*"
    r"|(Malloc|Free|MemAlloc|MemFree)(?!\w*Async)\w*|(Mem)?Host(Alloc|Register|Unregister)"
    r")(_v\d+)?(_pt[ds][sz])?"
)


def waits(name: str) -> bool:
    """Does this call of CUDA's runtime or driver keep the host until the device has done something? Those that allocate and
    free do now and then. Asynchronous copies from pageable memory wait too: `torch.cuda.set_sync_debug_mode` sees them."""
    return _WAITS.fullmatch(name) is not None


@dataclass
class Seen:
    calls: list[Counter[str]] = field(default_factory=list)
    """Of each step: names of CUDA runtime and driver calls on the launch thread."""
    between: Counter[str] = field(default_factory=Counter)
    """The same, from one step's end to the next one's begin: what it does beside running programs."""
    busy: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each kernel and copy on the device, µs, in order."""

    def waiting(self) -> dict[str, int]:
        """Calls of the launch thread that wait for the device, in steps and between them."""
        every = sum((*self.calls, self.between), Counter[str]())
        return {name: count for name, count in every.items() if waits(name)}

    def idle(self) -> list[float]:
        """µs that the device pauses between one step's program and the next one's."""
        gaps = []
        end = self.busy[0][1]
        for begin, stop in self.busy[1:]:
            gaps.append(max(0.0, begin - end))
            end = max(end, stop)
        # As many gaps as there are borders between steps, the longest ones: inside a graph the device does not pause longer.
        return sorted(gaps, reverse=True)[: max(0, len(self.calls) - 1)]


class _Marked:
    """The step programs, each step inside a range that the profiler knows."""

    def __init__(self, programs: Any) -> None:
        self._programs = programs
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def run(self, plan: Any) -> Any:
        assert not plan.prefill
        self.steps += 1
        with record_function(STEP):
            return self._programs.run(plan)


def watch(local: LocalEngine, batch: int, steps: int, *, context: int = 40, sampled: bool = False) -> Seen:
    """Let `batch` sequences decode, and look at `steps` steps once they run steadily."""
    return local.call(_watch(local, batch, steps, context, sampled))


async def _watch(local: LocalEngine, batch: int, steps: int, context: int, sampled: bool) -> Seen:
    executor, client = local.engine.executor, local.generation.client
    marked, plain = _Marked(executor.programs), executor.programs
    vocabulary = local.engine.info.spec.vocab_size
    counts = [0] * batch

    async def follow(number: int) -> None:
        prompt = [(number + 3) * (i % 5 + 1) % vocabulary for i in range(context)]
        params = SamplingParams(
            max_tokens=4 * (WARM * 3 + steps) + 200, temperature=0.8 if sampled else 0.0, seed=number, ignore_eos=True
        )
        async for output in client.submit(Request(id=f"watched-{number}", prompt=prompt, params=params)):
            counts[number] += len(output.tokens)

    async def more(by: int) -> None:
        goals = [count + by for count in counts]
        while any(count < goal for count, goal in zip(counts, goals, strict=True)):
            await asyncio.sleep(0.001)

    profilers: list[Any] = []

    def begin() -> None:
        torch.cuda.synchronize()
        profilers.append(profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]))
        profilers[0].__enter__()
        executor.programs = marked  # type: ignore[assignment]

    def end() -> None:
        executor.programs = plain
        torch.cuda.synchronize()
        profilers[0].__exit__(None, None, None)

    tasks = [asyncio.create_task(follow(number)) for number in range(batch)]
    try:
        await more(3 * WARM)
        await asyncio.wrap_future(executor.call(begin))
        while marked.steps < steps:
            await asyncio.sleep(0.001)
        await asyncio.wrap_future(executor.call(end))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _read(profilers[0])


def _read(profiler: Any) -> Seen:
    seen = Seen()
    events = list(profiler.events())
    on_device = torch.autograd.DeviceType.CUDA
    steps = [event for event in events if event.name == STEP and event.device_type != on_device]
    ranges = sorted((event.time_range.start, event.time_range.end) for event in steps)
    seen.calls = [Counter() for _ in ranges]
    calls = [event for event in events if event.device_type != on_device and _CALL.fullmatch(event.name)]
    # The number that calls have of a thread may be that of one that has ended, and it need not be the one that ranges have.
    [thread] = {event.device_resource_id for event in calls if "Launch" in event.name}
    for event in calls:
        start = event.time_range.start
        if event.device_resource_id == thread and ranges[0][0] <= start < ranges[-1][1]:
            # The last step that had begun.
            step = bisect([begin for begin, _ in ranges], start) - 1
            (seen.calls[step] if start < ranges[step][1] else seen.between)[event.name] += 1
    for event in events:
        if event.device_type == on_device and event.name != STEP and event.time_range.elapsed_us() > 0:
            seen.busy.append((event.time_range.start, event.time_range.end))
    seen.busy.sort()
    return seen
