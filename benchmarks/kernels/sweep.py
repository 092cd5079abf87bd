"""What the product benchmarks share: many tiles compiled at once, then timed by rotation through more weights than L2 holds.

A graph holds one launch for each copy of the operands, one behind the other, as in a step of a model; the time is that of a
replay divided by the copies, median of a few. Programs that are set up while the one before still runs gain by that, here as
there.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import torch
from triton import AsyncCompileMode

from fluentllm.kernels.triton.launch import recording
from fluentllm.prewarm import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fluentllm.kernels.triton.launch import Launch

DEVICE = "cuda"
ROTATED_BYTES = 160 << 20
"""Read between two uses of one copy: more than three times L2."""


def copies_for(nbytes: int) -> int:
    """Copies of operands of `nbytes` that a rotation needs."""
    return max(1, min(48, -(-ROTATED_BYTES // nbytes)))


def rotate(runs: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median microseconds of one of `runs`, each of which launches on operands of its own."""
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    del kept
    return statistics.median(times) / len(runs)


def precompile(runs: Iterable[Callable[[], object]]) -> int:
    """Compile everything that `runs` would launch (on tensors of the device "meta") into Triton's cache. Returns how many
    kernels.

    In as many processes as there are cores, if CUDA was not used yet in this one, else in threads. What does not compile is
    left to fail where it is launched.
    """
    with recording() as launches:
        for run in runs:
            run()
    seen = {key_of(one): one for one in launches}
    if torch.cuda.is_initialized():
        with ThreadPoolExecutor() as pool, AsyncCompileMode(pool, ignore_errors=True):
            for one in seen.values():
                one.kernel.warmup(*one.args, grid=one.grid, **one.options)
        return len(seen)
    workers = os.cpu_count() or 1
    children = []
    for number in range(workers):
        child = os.fork()
        if child == 0:
            _compile_some(list(seen.values())[number::workers])
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return len(seen)


def _compile_some(launches: Sequence[Launch]) -> NoReturn:
    for one in launches:
        with suppress(Exception):
            one.kernel.warmup(*one.args, grid=one.grid, **one.options)
    os._exit(0)


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((got.float() - expected).norm() / expected.norm().clamp_min(1e-30))


def gbps(nbytes: float, us: float) -> float:
    return nbytes / us / 1e3


def line(values: Iterable[object], widths: Sequence[int]) -> str:
    """A line of a table; what is None was not measured."""
    return "  ".join(_shown(value).rjust(width) for value, width in zip(values, widths, strict=True))


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
