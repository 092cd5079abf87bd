"""The state machine that all transports share, on a library that takes its time, and on notes that are not for us."""

from __future__ import annotations

import threading
import time
from collections import deque

import msgspec
import torch

from fluentllm.core.settings import Settings
from fluentllm.core.transport import Notified, TransportContext
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
