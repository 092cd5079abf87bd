"""One decode step, kernel by kernel: the real engine runs requests, and the profiler watches some of its steps.

Two looks on a GPU: steps as they are served (captured in a CUDA graph) give the times, and eager ones, whose operations and
launches have shapes, give bytes and FLOPs. On a CPU one look gives both, of operations instead of kernels.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..core.errors import ConfigError
from ..core.kv.formats import token_bytes
from ..core.types import Request, SamplingParams
from .costs import HOW, PRODUCTS, Cost, Load, ceilings, of_launch, of_product
from .floor import routing_of

if TYPE_CHECKING:
    from ..core.executor import Executor, Pending
    from ..core.types import ModelInfo, StepPlan
    from ..local import LocalEngine

WARM_STEPS = 6
"""Before the first look: eager, captured, replayed."""


@dataclass(slots=True)
class Look:
    """What one window of steps showed."""

    steps: int = 0
    seconds: float = 0.0
    """Of all steps together, from the begin of the first to the end of the last, on the device."""
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Name → seconds by which each call took the steps' end further; on a GPU they add up to `seconds`, idle time in front of a
    kernel being its own. A kernel that is set up while others still run (programmatic launches) begins long before that."""
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Name → seconds from begin to end of all calls, waiting included."""
    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))


class _Counted:
    """The step programs, and how many steps they ran."""

    def __init__(self, programs: Any) -> None:
        self._programs = programs
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def run(self, plan: StepPlan) -> list[Pending]:
        if plan.prefill:
            raise ConfigError("A prompt came between the steps.", fix="Measure a smaller --batch, which fits at once.")
        self.steps += 1
        pending: list[Pending] = self._programs.run(plan)
        return pending


def measure(local: LocalEngine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """`steps` decode steps of `batch` sequences after prompts of `context` tokens → rows for each kernel, and sums.

    Raises `ConfigError` for a batch that does not run at once.
    """
    from .offline import _check_fits

    device = torch.device(local.engine.info.device)
    on_gpu = device.type == "cuda"
    looks = 2 if on_gpu else 1
    # Tokens: a step gives each sequence one and up to all that were drafted; a few steps more run before a look ends. A
    # sequence whose drafts are luckier than others' gets further than they do, so each may write as much as there is room for.
    info = local.engine.info
    least = context + (WARM_STEPS + looks * (steps + WARM_STEPS) + 40) * _rows(info)
    _check_fits(local, batch, least)
    room = min(info.max_model_len, info.kv_tokens // info.page_size // batch * info.page_size)
    budget = max(least, room) - context
    served, eager, length = local.call(_run(local, batch, context, steps, budget, on_gpu))
    rates = ceilings(device)
    return _table(served, eager or served, rates, {"batch": batch, "ctx": context, "mean_kv_length": length, "on_gpu": on_gpu})


def _rows(info: ModelInfo) -> int:
    """Tokens of a sequence in a step: one, and those drafted for it at most."""
    return 1 + (info.speculative.max_k if info.speculative is not None else 0)


async def _run(
    local: LocalEngine, batch: int, context: int, steps: int, budget: int, on_gpu: bool
) -> tuple[Look, Look | None, float]:
    from .offline import Drafts

    rng = random.Random()
    engine, client = local.engine, local.generation.client
    counts, rows, drafts = [0] * batch, _rows(engine.info), Drafts()

    async def follow(number: int) -> None:
        prompt = rng.choices(range(engine.info.spec.vocab_size), k=context)
        params = SamplingParams(max_tokens=budget, temperature=0.0, ignore_eos=True)
        async for output in client.submit(Request(id=f"step-{number}", prompt=prompt, params=params)):
            drafts.add(output, first=not counts[number])
            counts[number] += len(output.tokens)

    def load() -> Load:
        kv_bytes, routing = token_bytes(engine.info.spec.kv, engine.info.kv_dtype), routing_of(engine.executor.programs)
        return Load(engine.info.spec, batch, rows, length, kv_bytes, routing, 1 + drafts.mean)

    async def advanced(by: int) -> None:
        """Until every sequence has gone at least `by` steps on."""
        goals = [count + by * rows for count in counts]
        while any(count < goal for count, goal in zip(counts, goals, strict=True)):
            if any(task.done() for task in tasks):
                raise ConfigError("The sequences ended before they were measured.", fix="Measure fewer --steps.")
            await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(follow(number)) for number in range(batch)]
    try:
        await advanced(1 + WARM_STEPS)
        length = context + sum(counts) / batch + steps * rows / 2  # in the middle of the look
        served = await _look(engine.executor, steps, advanced, load(), on_gpu, shapes=not on_gpu)
        eager = None
        if on_gpu:
            engine.executor.programs.eager = True  # type: ignore[attr-defined]
            await advanced(WARM_STEPS)
            eager = await _look(engine.executor, min(steps, 4), advanced, load(), on_gpu, shapes=True)
            engine.executor.programs.eager = False  # type: ignore[attr-defined]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return served, eager, length


async def _look(executor: Executor, steps: int, advanced: Any, load: Load, on_gpu: bool, *, shapes: bool) -> Look:
    """The profiler begins and ends on the executor's own thread, between two steps."""
    look = Look()
    counted, plain = _Counted(executor.programs), executor.programs
    stack = contextlib.ExitStack()

    def begin() -> None:
        from ..kernels.triton.launch import recording

        if on_gpu:
            torch.cuda.synchronize()
        look_launches.extend([] if not (shapes and on_gpu) else [stack.enter_context(recording(run=True))])
        activities = [ProfilerActivity.CUDA] if on_gpu else []
        if shapes:
            activities.append(ProfilerActivity.CPU)
        profilers.append(stack.enter_context(profile(activities=activities, record_shapes=shapes)))
        executor.programs = counted

    def end() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        executor.programs = plain
        stack.close()

    look_launches: list[list[Any]] = []
    profilers: list[Any] = []
    await asyncio.wrap_future(executor.call(begin))
    try:
        await advanced(steps)
    finally:
        await asyncio.wrap_future(executor.call(end))
    look.steps = counted.steps
    _read(look, profilers[0], on_gpu)
    for launches in look_launches:
        for launch in launches:
            look.costs[launch.kernel.__name__].add(of_launch(launch.kernel.__name__, launch.args, load))
    return look


def _read(look: Look, profiler: Any, on_gpu: bool) -> None:
    spans = []
    for event in profiler.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == on_gpu and not event.name.startswith(("ProfilerStep", "[memory]")):
            seconds = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6
            if seconds > 0:
                look.busy[event.name] += seconds
                spans.append((event.time_range.start / 1e6, event.time_range.end / 1e6, event.name))
                if not on_gpu:
                    look.times[event.name].append(seconds)
        if not on_device and event.name in PRODUCTS:
            cost = of_product(event.name, event.input_shapes, 2 if on_gpu else 4)
            for name in [kernel.name for kernel in event.kernels] if on_gpu else [event.name]:
                if cost is not None:
                    look.costs[name].add(cost)
    if spans:
        look.seconds = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    if on_gpu:
        for name, seconds in advances(spans):
            look.times[name].append(seconds)


def advances(spans: list[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """(start, end, name) of kernels, which may overlap → (name, seconds by which it took the latest end further), in the order
    of their ends; the sum is the span of all."""
    latest = min((start for start, _, _ in spans), default=0.0)
    for _, end, name in sorted(spans, key=lambda span: span[1]):
        yield name, max(0.0, end - latest)
        latest = max(latest, end)


def _table(served: Look, shaped: Look, rates: dict[str, float], about: dict[str, Any]) -> dict[str, Any]:
    steps = max(1, served.steps)
    rows = [_row(name, times, served.busy[name], steps, shaped, rates) for name, times in served.times.items()]
    rows.sort(key=lambda row: -row["us"])
    step, total = served.seconds / steps * 1e6, sum(row["us"] for row in rows)
    return {
        **about,
        "steps": served.steps,
        "step_us": step,
        "sum_us": total,
        "gap_us": step - total,
        "ceilings": rates,
        "counted": HOW,
        "kernels": rows,
    }


def _row(name: str, times: list[float], busy: float, steps: int, shaped: Look, rates: dict[str, float]) -> dict[str, Any]:
    """Of one step."""
    microseconds = sum(times) / steps * 1e6
    row: dict[str, Any] = {
        "name": name,
        "us": microseconds,
        "busy_us": busy / steps * 1e6,
        "count": len(times) / steps,
    }
    cost = shaped.costs.get(name)
    if cost is None or not shaped.steps:
        return row | {"bytes": None, "flops": None, "roofline": None}
    size, flops = cost.bytes / shaped.steps, cost.flops / shaped.steps
    least = max(size / rates["bytes_s"], flops / rates["flops_s"]) * 1e6
    return row | {"bytes": size, "flops": flops, "roofline": least / microseconds}


def lines(figures: dict[str, Any], most: int = 40) -> Iterator[str]:
    """The table, for people."""
    yield f"{'kernel':<58} {'µs':>9} {'busy':>9} {'count':>6} {'MB':>9} {'GFLOP':>8} {'roofline':>8}"
    for row in figures["kernels"][:most]:
        size = f"{row['bytes'] / 1e6:9.2f}" if row["bytes"] is not None else f"{'':>9}"
        flops = f"{row['flops'] / 1e9:8.2f}" if row["flops"] else f"{'':>8}"
        share = f"{row['roofline'] * 100:6.0f} %" if row["roofline"] is not None else ""
        yield f"{row['name'][:58]:<58} {row['us']:9.1f} {row['busy_us']:9.1f} {row['count']:6.1f} {size} {flops} {share:>8}"
    if len(figures["kernels"]) > most:
        yield f"… and {len(figures['kernels']) - most} more"
    rates = figures["ceilings"]
    sums = f"sum {figures['sum_us']:.1f} µs, step {figures['step_us']:.1f} µs, gap {figures['gap_us']:.1f} µs"
    unseen = "" if figures["on_gpu"] else "; the gap holds C kernels and Python, which the profiler does not see"
    yield f"{sums} ({figures['steps']} steps{unseen})"
    yield f"measured here: {rates['bytes_s'] / 1e9:.0f} GB/s, {rates['flops_s'] / 1e12:.2f} TFLOP/s. {figures['counted']}"
