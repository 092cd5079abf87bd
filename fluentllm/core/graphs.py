"""Captured programs by key: what the device does for one key is recorded once as a CUDA graph, then launched whole.

A key's first run is eager: it compiles what is new, and its tokens are as good as any. The second run captures and
replays; every later one replays. So nothing is captured that is not used, and no request waits for a graph.

Hazards: a program must read only tensors that stay where they are (slot tables, pools, weights, its static inputs), must not
wait for the device, and its outputs are overwritten by its next run: copy them out on the same stream. All graphs share
one memory pool, so they must run on one stream, one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

log = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")


class Graphs(Generic[Outputs]):
    """Runs programs on the current stream of one CUDA device, which may not be the default stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._uncapturable: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, program: Callable[[], Outputs]) -> Outputs:
        """Enqueue `program`, or the graph that was captured of it; its outputs are ready in stream order."""
        known = self._captured.get(key)
        if known is None:
            if key not in self._seen or key in self._uncapturable:
                self._seen.add(key)
                return program()
            known = self._capture(key, program)
            if known is None:
                return program()
        graph, outputs = known
        graph.replay()
        return outputs

    def clear(self) -> None:
        """Forget all graphs: what they captured is no longer what should run."""
        self._captured.clear()
        # The allocator has given the old pool up with its last graph.
        self._pool = torch.cuda.graph_pool_handle()
        self._seen.clear()
        self._uncapturable.clear()

    def _capture(self, key: Hashable, program: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs] | None:
        """None where the program cannot be captured: it then runs eagerly for good."""
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would wait for the device and collect garbage, while other steps are running.
        # Other threads may allocate or wait for events meanwhile: only this one's calls count.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = program()
        except Exception:
            _abandon(graph)
            # The allocator may still count the old pool as being captured into.
            self._pool = torch.cuda.graph_pool_handle()
            self._uncapturable.add(key)
            log.warning("program %s cannot be captured in a CUDA graph and runs eagerly", key, exc_info=True)
            return None
        graph.capture_end()
        self._captured[key] = graph, outputs
        log.debug("captured program %s", key)
        return graph, outputs


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed; the runtime may have invalidated it already."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        log.debug("the capture had been invalidated: %s", error)
