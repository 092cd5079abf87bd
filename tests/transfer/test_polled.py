"""The state machine that all transports share, on a library that takes its time, and on notes that are not for us."""

from __future__ import annotations

import threading
import time
from collections import deque

import msgspec
import numpy as np
import pytest
import torch

from fluentllm.core.settings import Settings
from fluentllm.core.transport import Notified, PeerReady, TransferDone, TransportContext
from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing import assert_kv_transport_conforms
from fluentllm.transfer.polled import PolledTransport
from fluentllm.transfer.wire import Envelope


class LateWire(LoopbackWire):
    """Copies when it is asked the third time whether it has."""

    def post(self, connection, rows):
        return [connection, rows, 3]

    def finished(self, operation):
        if operation is None:
            return True
        operation[2] -= 1
        if operation[2]:
            return False
        super().post(*operation[:2])
        return True


def test_a_library_that_takes_its_time_conforms() -> None:
    passed = assert_kv_transport_conforms(lambda context: PolledTransport(context, LateWire()))
    assert len(passed) >= 12


def test_notes_that_are_not_for_us_are_dropped_and_counted() -> None:
    woken = threading.Event()
    wires = LoopbackWire(), LoopbackWire()
    ours, theirs = (
        PolledTransport(TransportContext(name, "127.0.0.1", Settings(), woken.set), wire)
        for name, wire in zip(("ours", "theirs"), wires, strict=True)
    )
    memory = torch.zeros(8, dtype=torch.uint8)
    ours.register([memory])
    theirs.register([memory.clone()])
    ours.connect(theirs.metadata())
    inbox: deque[bytes] = wires[0]._inbox
    source, target = theirs.epoch, ours.epoch
    for envelope in (
        Envelope(source, target + 1, b"for our earlier life"),
        Envelope(source + 1, target, b"from nobody we know"),
        Envelope(source, target, None),
        Envelope(source, target, b"for us"),
    ):
        inbox.append(msgspec.msgpack.encode(envelope))
    inbox.extend([b"", b"\xff\xff", msgspec.msgpack.encode(["fluent-kv-note", "x", 1, b""])])
    found = []
    deadline = time.monotonic() + 5
    while ours.counters.malformed < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
        found += ours.poll()
    found += ours.poll()
    assert [event.payload for event in found if isinstance(event, Notified)] == [b"for us"]
    counters = ours.counters
    assert (counters.notified, counters.stale, counters.malformed) == (1, 2, 3)
    ours.close()
    theirs.close()


class CarryingWire(LoopbackWire):
    """Delivers a note behind its rows, and writes down how each went."""

    carries_notes = True

    def __init__(self, chunk_bytes: int = LoopbackWire.chunk_bytes) -> None:
        super().__init__()
        self.chunk_bytes = chunk_bytes
        self.posted: list[tuple[int, bool]] = []
        self.sent = 0

    def post(self, connection, rows, note=None):
        super().post(connection, rows)
        self.posted.append((int(rows[:, 2].sum()), note is not None))
        if note is not None:
            super().send(connection, note)

    def send(self, connection, note):
        self.sent += msgspec.msgpack.decode(note, type=Envelope).payload is not None
        super().send(connection, note)


def test_a_library_that_carries_notes_conforms() -> None:
    passed = assert_kv_transport_conforms(lambda context: PolledTransport(context, CarryingWire()))
    assert len(passed) >= 12


@pytest.mark.parametrize(
    ("size", "note", "posted", "sent"),
    [
        (3, b"written", [(3, True)], 0),
        (4, None, [(4, False)], 0),
        (0, b"nothing to write", [], 1),
        (8, b"in two chunks", [(4, False), (4, True)], 0),
    ],
)
def test_the_library_sends_the_note_behind_what_is_written_last(size, note, posted, sent) -> None:
    """Only where nothing of the transfer is under way any more: here every chunk ends at once."""
    woken, wire = threading.Event(), CarryingWire(4)
    ours, theirs = (
        PolledTransport(TransportContext(name, "127.0.0.1", Settings(), woken.set), each)
        for name, each in (("ours", wire), ("theirs", LoopbackWire()))
    )
    memory = torch.arange(8, dtype=torch.uint8)
    arrived = torch.zeros(8, dtype=torch.uint8)
    ours.register([memory])
    theirs.register([arrived])
    events: dict[str, list[object]] = {"ours": [], "theirs": []}

    def wait(name: str, kind: type) -> object:
        while not (found := [event for event in events[name] if isinstance(event, kind)]):
            woken.wait(1)
            woken.clear()
            for other, end in (("ours", ours), ("theirs", theirs)):
                events[other] += end.poll()
        return found[0]

    peer = ours.connect(theirs.metadata())
    theirs.connect(ours.metadata())
    wait("ours", PeerReady)
    ours.submit(peer, np.array([[0, 0, size]]), note)
    assert wait("ours", TransferDone).status == "done"  # type: ignore[attr-defined]
    if note is not None:
        assert wait("theirs", Notified).payload == note  # type: ignore[attr-defined]
    assert (wire.posted, wire.sent) == (posted, sent)
    assert arrived.tolist() == [*range(size), *[0] * (8 - size)]
    ours.close()
    theirs.close()


def test_chunks_under_way_hold_the_note_back() -> None:
    """What is posted last may land first, so the note is sent when all have landed."""
    woken, over = threading.Event(), threading.Event()

    class Slow(CarryingWire):
        def post(self, connection, rows, note=None):
            super().post(connection, rows, note)
            return rows

        def finished(self, operation):
            return operation is None or over.is_set()

    wire = Slow(4)
    ours, theirs = (
        PolledTransport(TransportContext(name, "127.0.0.1", Settings(), woken.set), each)
        for name, each in (("ours", wire), ("theirs", LoopbackWire()))
    )
    ours.register([torch.zeros(8, dtype=torch.uint8)])
    theirs.register([torch.zeros(8, dtype=torch.uint8)])
    events: list[object] = []

    def wait(kind: type) -> None:
        while not any(isinstance(event, kind) for event in events):
            woken.wait(1)
            woken.clear()
            events.extend(ours.poll())

    peer = ours.connect(theirs.metadata())
    wait(PeerReady)
    ours.submit(peer, np.array([[0, 0, 8]]), b"written")
    deadline = time.monotonic() + 60
    while len(wire.posted) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (wire.posted, wire.sent) == ([(4, False), (4, False)], 0)
    over.set()
    wait(TransferDone)
    assert wire.sent == 1
    ours.close()
    theirs.close()
