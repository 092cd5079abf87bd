"""The transport that goes wrong on purpose: each fault does what it says, is counted, and every transfer still ends once."""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fluentllm.core.settings import Settings
from fluentllm.core.transport import Notified, Peer, PeerDied, PeerGone, PeerReady, TransferDone, TransportContext
from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing import assert_kv_transport_conforms
from fluentllm.transfer.faults import FaultPlan, FaultyTransport
from fluentllm.transfer.polled import PolledTransport

SIZE = 64 * 1024


class Ends:
    """A faulty source and a plain target, connected."""

    def __init__(self, plan: FaultPlan) -> None:
        self.woken = {name: threading.Event() for name in ("source", "target")}
        made = {
            name: PolledTransport(TransportContext(name, "127.0.0.1", Settings(), self.woken[name].set), LoopbackWire())
            for name in ("source", "target")
        }
        self.source = FaultyTransport(made["source"], plan, self.woken["source"].set)
        self.target = made["target"]
        generator = torch.Generator().manual_seed(1)
        self.ours = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator)
        self.theirs = torch.zeros(SIZE, dtype=torch.uint8)
        self.source.register([self.ours])
        self.target.register([self.theirs])
        self.peer = self.connect()

    def connect(self) -> Peer:
        peer = self.source.connect(self.target.metadata())
        self.target.connect(self.source.metadata())
        self.wait(self.source, PeerReady)
        return peer

    def wait(self, end: object, kind: type | tuple[type, ...], count: int = 1, within: float = 5.0) -> list:
        """Everything up to the count-th event of the kind, or what came until the time is up."""
        found: list = []
        woken = self.woken["source" if end is self.source else "target"]
        deadline = time.monotonic() + within
        while sum(isinstance(event, kind) for event in found) < count and time.monotonic() < deadline:
            woken.wait(0.02)
            woken.clear()
            found += end.poll()
        return [event for event in found if isinstance(event, kind)]

    def write(self, start: int = 0, length: int = SIZE, note: bytes = b"note") -> int:
        return self.source.submit(self.peer, np.array([[start, start, length]]), note)


@pytest.fixture
def make() -> Iterator:
    made: list[Ends] = []

    def start(**plan: float) -> Ends:
        made.append(Ends(FaultPlan(**plan)))
        return made[-1]

    yield start
    for ends in made:
        ends.source.close()
        ends.target.close()


def test_without_faults_it_is_a_transport_like_any_other() -> None:
    def factory(context: TransportContext) -> FaultyTransport:
        return FaultyTransport(PolledTransport(context, LoopbackWire()), FaultPlan(), context.wake)

    assert len(assert_kv_transport_conforms(factory)) >= 12


def test_dropped(make) -> None:
    ends = make(drop=1)
    number = ends.write()
    [done] = ends.wait(ends.source, TransferDone)
    assert (done.transfer, done.status, done.size) == (number, "done", SIZE)
    assert ends.wait(ends.target, Notified, within=0.2) == []
    assert not ends.theirs.any()
    assert ends.source.faults["drop"] == 1
    assert ends.source.counters.as_dict()["fault_drop"] == 1


def test_duplicated(make) -> None:
    ends = make(duplicate=1)
    number = ends.write()
    assert [note.payload for note in ends.wait(ends.target, Notified, 2)] == [b"note", b"note"]
    assert [done.transfer for done in ends.wait(ends.source, TransferDone, 2, within=0.3)] == [number]
    assert torch.equal(ends.ours, ends.theirs)
    assert ends.source.faults["duplicate"] == 1


@pytest.mark.parametrize("length", [1, 5, 16, SIZE])
def test_corrupted(make, length: int) -> None:
    ends = make(corrupt=1, seed=length)
    before = ends.ours.clone()
    ends.write(SIZE - length, length)
    assert len(ends.wait(ends.target, Notified)) == 1
    wrong = (ends.theirs[SIZE - length :] != ends.ours[SIZE - length :]).sum()
    assert 1 <= wrong <= 16
    assert torch.equal(ends.ours, before), "the sender's own memory stays as it is"
    assert not ends.theirs[: SIZE - length].any()
    assert ends.source.faults["corrupt"] == 1


def test_a_corrupted_note(make) -> None:
    ends = make(corrupt_note=1)
    ends.write(note=b"a longer note")
    [note] = ends.wait(ends.target, Notified)
    assert sum(a != b for a, b in zip(note.payload, b"a longer note", strict=True)) == 1
    assert torch.equal(ends.ours, ends.theirs)


def test_delayed_and_reordered(make) -> None:
    ends = make(delay=1, delay_seconds=0.2, seed=3)
    started = time.monotonic()
    for number in range(10):
        ends.write(number, 1, bytes([number]))
    notes = [note.payload[0] for note in ends.wait(ends.target, Notified, 10)]
    assert sorted(notes) == list(range(10))
    assert notes != sorted(notes)
    assert time.monotonic() - started > 0.1
    other = make(reorder=0.5, seed=1)
    for number in range(10):
        other.write(number, 1, bytes([number]))
    notes = [note.payload[0] for note in other.wait(other.target, Notified, 10)]
    assert sorted(notes) == list(range(10))
    assert notes != sorted(notes)
    assert other.source.faults["reorder"] > 0


def test_disconnected(make) -> None:
    ends = make(disconnect=1)
    number = ends.write()
    done, gone = ends.wait(ends.source, (TransferDone, PeerGone), 2)
    assert (done.transfer, done.status) == (number, "failed")
    assert isinstance(gone, PeerGone)
    assert isinstance(gone.error, PeerDied)
    with pytest.raises(PeerDied):
        ends.write()
    assert ends.connect().number != gone.peer.number


def test_slow(make) -> None:
    ends = make(bytes_per_second=SIZE * 20)
    started = time.monotonic()
    for _ in range(6):
        ends.write()
    assert len(ends.wait(ends.source, TransferDone, 6)) == 6
    assert 0.25 < time.monotonic() - started < 2
    assert not ends.source.faults


def test_what_is_held_can_be_cancelled_and_ends_with_the_peer(make) -> None:
    ends = make(delay=1, delay_seconds=1000, seed=5)
    first, second = ends.write(), ends.write()
    ends.source.cancel(first)
    [done] = ends.wait(ends.source, TransferDone)
    assert (done.transfer, done.status) == (first, "cancelled")
    ends.target.close()
    events = ends.wait(ends.source, (TransferDone, PeerGone), 2)
    assert [type(event) for event in events] == [TransferDone, PeerGone]
    assert (events[0].transfer, events[0].status) == (second, "failed")


def chaos(seed: int, count: int) -> tuple[Counter, int, int]:
    """Everything at once → faults, intact notifications, notifications whose bytes or own text are wrong."""
    ends = Ends(
        FaultPlan(
            seed=seed,
            drop=0.1,
            delay=0.2,
            duplicate=0.1,
            reorder=0.1,
            corrupt=0.1,
            corrupt_note=0.1,
            disconnect=0.03,
            delay_seconds=0.02,
        )
    )
    intact = wrong = 0
    waiting: Counter[int] = Counter()
    for number in range(count):
        start = (number * 64) % SIZE
        data = ends.ours[start : start + 64].numpy().tobytes()
        note = f"{start}:{zlib.crc32(data)}".encode()
        waiting[ends.write(start, 64, note)] += 1
        [done] = ends.wait(ends.source, TransferDone)
        waiting[done.transfer] -= 1
        if any(isinstance(event, PeerGone) for event in ends.source.poll()) or done.status == "failed":
            ends.peer = ends.connect()
        time.sleep(0.001)
        for event in ends.target.poll():
            if isinstance(event, Notified):
                try:
                    start, check = map(int, event.payload.decode().split(":"))
                    good = zlib.crc32(ends.theirs[start : start + 64].numpy()) == check
                except ValueError:
                    good = False
                intact, wrong = intact + good, wrong + (not good)
    assert set(waiting.values()) == {0}, "each transfer ends once"
    assert torch.equal(ends.ours, Ends(FaultPlan()).ours)
    ends.source.close()
    ends.target.close()
    return ends.source.faults, intact, wrong


def test_everything_at_once_is_seeded_and_detected() -> None:
    faults, intact, wrong = chaos(7, 120)
    assert set(faults) == {"drop", "delay", "duplicate", "reorder", "corrupt", "corrupt_note", "disconnect"}
    assert min(faults.values()) > 0
    assert intact > 40
    assert wrong > 0
    assert chaos(7, 120)[0] == faults
    assert chaos(8, 60)[0] != faults
