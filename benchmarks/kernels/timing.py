"""Timing of GPU kernels: CUDA-graph replay, L2 flushed between runs, median.

A graph holds one run. Before every replay a buffer larger than L2 is written, then the device sleeps a moment so that the
host is ahead of it; the time is that between two events around the replay. What an empty kernel measures this way is
reported as `overhead_us` and not subtracted.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

FLUSH_BYTES = 256 << 20


class Timer:
    """Times callables that launch work on the current stream."""

    def __init__(self, runs: int = 30) -> None:
        self.runs = runs
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        """Median microseconds of a run."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(self.runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            torch.cuda._sleep(20_000)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def overhead(self) -> float:
        """Microseconds of a graph of one tiny kernel."""
        x = torch.zeros(1, device="cuda")
        return self(lambda: x.add_(1))
