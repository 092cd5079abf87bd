"""What the conformance suite of KV transports stands on: makes ends, waits for events, knows what memory should hold."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .ends import Event, Factory, Host, LocalEnd, RemoteEnd, load_factory

SIZES = [3 * 2**20 + 17, 2**20, 4096, 1]
"""Bytes of the tensors that most checks register."""
BIG = [24 * 2**20]


class Bench:
    """Makes ends in one process or two."""

    def __init__(self, factory: Factory | str, processes: int, device: str, host: str, seed: int, timeout: float) -> None:
        self.factory, self.processes, self.timeout = factory, processes, timeout
        self._about = (host, device)
        self.random = random.Random(seed)
        self._other: Host | None = None

    def end(self, name: str, remote: bool = False) -> Any:
        """`remote`: in the other process, if there shall be one."""
        if remote and self.processes == 2:
            assert isinstance(self.factory, str)
            self._other = self._other or Host(self.factory)
            return self._other.end(name, *self._about)
        factory = load_factory(self.factory) if isinstance(self.factory, str) else self.factory
        return LocalEnd(factory, name, *self._about)

    @contextmanager
    def pair(self, sizes: list[int] = SIZES) -> Iterator[Pair]:
        """A source here and a target, perhaps elsewhere, connected both ways."""
        source, target = self.end("source"), self.end("target", remote=True)
        try:
            yield Pair(self, source, target, sizes)
        finally:
            source.close()
            if not isinstance(target, RemoteEnd) or target.host is self._other:
                target.close()

    def kill(self, end: Any) -> None:
        """End it without a word, where it has a process; else close it."""
        if isinstance(end, RemoteEnd):
            end.host.kill()
            self._other = None
        else:
            end.close()

    def close(self) -> None:
        other, self._other = self._other, None
        if other is not None:
            other.stop()

    def until(self, end: Any, satisfied: Callable[[list[Event]], bool], what: str) -> list[Event]:
        """All events up to the first at which `satisfied` holds."""
        seen: list[Event] = []
        deadline = time.monotonic() + self.timeout
        while not satisfied(seen):
            left = deadline - time.monotonic()
            assert left > 0, f"no {what} within {self.timeout} s; events: {seen[-8:]}"
            seen += end.events(min(left, 1.0))
        return seen

    def rows(self, sizes: list[int], count: int, taken: bytearray) -> list[list[int]]:
        """Random rows whose targets do not overlap what is `taken` already; lengths from 0 to a quarter of a tensor."""
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        found = []
        for _ in range(count):
            index, source = self.random.randrange(len(sizes)), self.random.randrange(len(sizes))
            limit = min(sizes[index], sizes[source])
            length = min(limit, self.random.choice([0, 1, 7, 64, 4096, limit // 16, limit // 4]))
            offset = starts[index] + self.random.randint(0, sizes[index] - length)
            if any(taken[offset : offset + length]):
                continue
            taken[offset : offset + length] = b"\1" * length
            found.append([starts[source] + self.random.randint(0, sizes[source] - length), offset, length])
        return found


class Pair:
    def __init__(self, bench: Bench, source: Any, target: Any, sizes: list[int]) -> None:
        self.bench, self.source, self.target, self.sizes = bench, source, target, sizes
        self.metadata = source.register(sizes, 1), target.register(sizes, 2)
        self.to_target = source.connect(self.metadata[1])
        self.to_source = target.connect(self.metadata[0])
        for end in (source, target):
            bench.until(end, lambda seen: any(event[0] == "ready" for event in seen), "PeerReady")
            end.expect(1)

    def done(self, *transfers: int, end: Any = None) -> dict[int, str]:
        """Wait for the end of these transfers, which must come once each → their status."""
        wanted = set(transfers)
        seen = self.bench.until(
            end or self.source, lambda seen: wanted <= {event[1] for event in seen if event[0] == "done"}, "TransferDone"
        )
        ends = [event for event in seen if event[0] == "done"]
        assert len(ends) == len({event[1] for event in ends}), f"a transfer ended twice: {ends}"
        return {event[1]: event[2] for event in ends}

    def notes(self, count: int, end: Any = None) -> list[Event]:
        """Wait for so many notifications."""
        seen = self.bench.until(
            end or self.target, lambda seen: sum(event[0] == "note" for event in seen) >= count, f"{count} notifications"
        )
        return [event for event in seen if event[0] == "note"]

    def gone(self, end: Any = None) -> list[Event]:
        return self.bench.until(end or self.source, lambda seen: any(event[0] == "gone" for event in seen), "PeerGone")


def copied(target: bytes, source: bytes, rows: list[list[int]]) -> bytes:
    """The plain reference."""
    memory = bytearray(target)
    for start, offset, length in rows:
        memory[offset : offset + length] = source[start : start + length]
    return bytes(memory)


def differs(left: bytes, right: bytes) -> str:
    """For assertions: how many bytes, and where."""
    wrong = [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    return f"{len(wrong)} of {len(left)} bytes differ, from {wrong[0]} to {wrong[-1]}" if wrong else ""


def any_bytes(memory: bytes) -> bool:
    """Whether any is not zero."""
    return memory.count(0) != len(memory)
