"""The state machine that all transports share, on a library that takes its time, and on notes that are not for us."""

from __future__ import annotations

import threading
import time
from collections import deque

import msgspec
import pytest

from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing import assert_kv_transport_conforms
from fluentllm.testing.bench import copied
from fluentllm.transfer.polled import PolledTransport
from fluentllm.transfer.wire import Envelope

from .pairs import pair_on


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
    wire = LoopbackWire()
    with pair_on(wire, [8]) as pair:
        inbox: deque[bytes] = wire._inbox
        ours, theirs = pair.source.epoch(), pair.target.epoch()
        for envelope in (
            Envelope(theirs, ours + 1, b"for our earlier life"),
            Envelope(theirs + 1, ours, b"from nobody we know"),
            Envelope(theirs, ours, None),
            Envelope(theirs, ours, b"for us"),
        ):
            inbox.append(msgspec.msgpack.encode(envelope))
        inbox.extend([b"", b"\xff\xff", msgspec.msgpack.encode(["fluent-kv-note", "x", 1, b""])])
        found = pair.notes(1, pair.source)
        deadline = time.monotonic() + 5
        while pair.source.counters()["malformed"] < 3 and time.monotonic() < deadline:
            found += pair.source.events(0.005)
        found += pair.source.events(0)
        assert [event[2] for event in found if event[0] == "note"] == [b"for us"]
        counters = pair.source.counters()
        assert (counters["notified"], counters["stale"], counters["malformed"]) == (1, 2, 3)


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
    wire, rows = CarryingWire(4), [[0, 0, size]]
    with pair_on(wire, [8]) as pair:
        source, before = pair.source.memory(), pair.target.memory()
        transfer = pair.source.submit(pair.to_target, rows, note)
        assert pair.done(transfer) == {transfer: "done"}
        if note is not None:
            assert [event[2] for event in pair.notes(1)] == [note]
        assert (wire.posted, wire.sent) == (posted, sent)
        assert pair.target.memory() == copied(before, source, rows)


def test_chunks_under_way_hold_the_note_back() -> None:
    """What is posted last may land first, so the note is sent when all have landed."""
    over = threading.Event()

    class Slow(CarryingWire):
        def post(self, connection, rows, note=None):
            super().post(connection, rows, note)
            return rows

        def finished(self, operation):
            return operation is None or over.is_set()

    wire = Slow(4)
    with pair_on(wire, [8]) as pair:
        transfer = pair.source.submit(pair.to_target, [[0, 0, 8]], b"written")
        deadline = time.monotonic() + 60
        while len(wire.posted) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert (wire.posted, wire.sent) == ([(4, False), (4, False)], 0)
        over.set()
        assert pair.done(transfer) == {transfer: "done"}
        assert wire.sent == 1
