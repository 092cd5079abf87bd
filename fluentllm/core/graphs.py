"""Captured programs by key: what the device does for one key is recorded once as a CUDA graph, then launched whole.

A key's first run is eager: it compiles what is new, and its tokens are as good as any. The second run captures and
replays; every later one replays. So nothing is captured that is not used, and no request waits for a graph. Graphs take memory
of their own, so of more than `MOST` the one that was used longest ago is given up.

Hazards: a program must read only tensors that stay where they are (slot tables, pools, weights, its static inputs), must not
wait for the device, and its outputs are overwritten by its next run: copy them out on the same stream. All graphs share
one memory pool, so they must run on one stream, one after the other.

Who follows a program from outside (`cut`) gets it in pieces: a graph for each, and a call between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

log = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")

MOST = 192
"""Programs that are kept. Prefill passes have 25 sizes, and as many plans each as their contexts have sizes."""


@dataclass(slots=True)
class _Piece:
    graph: torch.cuda.CUDAGraph
    then: Callable[[], None] | None = None
    """What the host does behind its launch."""


class Graphs(Generic[Outputs]):
    """Runs programs on the current stream of one CUDA device, which may not be the default stream."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._pool: Any = None
        """Of the first graph, and of all others."""
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[list[_Piece], Outputs]] = {}
        """What was used last stands last."""
        self._uncapturable: set[Hashable] = set()
        self._pieces: list[_Piece] | None = None
        """Of the program that is being captured."""

    def __len__(self) -> int:
        return len(self._captured)

    def ready(self, key: Hashable) -> bool:
        """Would `run` neither compile nor capture?"""
        return key in self._captured or key in self._uncapturable

    def run(self, key: Hashable, program: Callable[[], Outputs]) -> Outputs:
        """Enqueue `program`, or the graph that was captured of it; its outputs are ready in stream order."""
        known = self._captured.pop(key, None)
        if known is None:
            if key not in self._seen or key in self._uncapturable:
                self._seen.add(key)
                return program()
            known = self._capture(key, program)
            if known is None:
                return program()
            if len(self._captured) == self._most:
                del self._captured[next(iter(self._captured))]
        self._captured[key] = known
        pieces, outputs = known
        for piece in pieces:
            piece.graph.replay()
            if piece.then is not None:
                piece.then()
        return outputs

    def cut(self, then: Callable[[], None]) -> None:
        """Inside a program: call `then` whenever the program runs, on the host, when all in front of the call has been enqueued
        and nothing behind it. All streams must have been joined."""
        if self._pieces is None:
            then()
            return
        piece = self._pieces[-1]
        piece.graph.capture_end()
        piece.then = then
        self._pieces.append(self._begin())

    def clear(self) -> None:
        """Forget all graphs: what they captured is no longer what should run."""
        self._captured.clear()
        # The allocator has given the old pool up with its last graph.
        self._pool = None
        self._seen.clear()
        self._uncapturable.clear()

    def _begin(self) -> _Piece:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would wait for the device and collect garbage, while other steps are running.
        # Other threads may allocate or wait for events meanwhile: only this one's calls count.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return _Piece(graph)

    def _capture(self, key: Hashable, program: Callable[[], Outputs]) -> tuple[list[_Piece], Outputs] | None:
        """None where the program cannot be captured: it then runs eagerly for good."""
        pieces = self._pieces = [self._begin()]
        try:
            outputs = program()
            pieces[-1].graph.capture_end()
        except Exception:
            _abandon(pieces[-1].graph)
            # The allocator may still count the old pool as being captured into.
            self._pool = None
            self._uncapturable.add(key)
            log.warning("program %s cannot be captured in a CUDA graph and runs eagerly", key, exc_info=True)
            return None
        finally:
            self._pieces = None
        log.debug("captured program %s", key)
        return pieces, outputs


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed; the runtime may have invalidated it already."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        log.debug("the capture had been invalidated: %s", error)
