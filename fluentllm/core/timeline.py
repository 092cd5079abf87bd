"""The timeline of a start: which process did what, from when to when, counted from the start of the first of them.

    timeline = Timeline("engine")
    with timeline.stage("weights"):
        ...

The supervisor hands its origin to its children, so that stages of several processes lie on one axis.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .types import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_IMPORTED = time.time()


class Timeline:
    """Stages of one process. Its first, `process`, is what passed before the timeline was made: interpreter and imports."""

    def __init__(self, process: str, origin: float | None = None) -> None:
        """`origin`: where the axis begins, in seconds since the epoch; by default where this process was created."""
        began = process_start()
        self.process = process
        self.origin = began if origin is None else origin
        self.stages: list[Stage] = []
        # What is known to 0.01 s may seem to have begun before the first of all.
        self.add("process", max(began, self.origin), time.time())

    def add(self, name: str, start: float, end: float) -> None:
        """`start` and `end` in seconds since the epoch. From any thread."""
        self.stages.append(Stage(self.process, name, round(start - self.origin, 4), round(end - self.origin, 4)))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside is the stage; one that fails is none."""
        start = time.time()
        yield
        self.add(name, start, time.time())

    def now(self) -> float:
        """Seconds since the origin."""
        return time.time() - self.origin


def process_start() -> float:
    """When this process was created, in seconds since the epoch, to about 0.01 s. Linux; elsewhere when this module was
    imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return _IMPORTED
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


def lines(stages: Iterable[Stage]) -> list[str]:
    """For people: one line a process, in the order of the stages' starts."""
    processes: dict[str, list[Stage]] = {}
    for stage in sorted(stages, key=lambda stage: stage.start):
        processes.setdefault(stage.process, []).append(stage)
    return [
        f"{process}: " + ", ".join(f"{stage.name} {stage.start:.1f}–{stage.end:.1f}" for stage in found) + " s"
        for process, found in processes.items()
    ]
