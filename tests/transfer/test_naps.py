"""How a transport's thread waits: a bell that is never missed, and looks that stay few however long a transfer takes."""

from __future__ import annotations

import threading
import time

from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.transfer.naps import BUSY_NAP, GROWTH, SHORT_NAP, Bell, moving_nap

from .pairs import pair_on


def test_a_bell_rung_while_nobody_naps_ends_the_next_nap_and_only_that() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    assert bell.wait(60)
    assert not bell.wait(0.001)


def test_a_bell_ends_a_nap_of_another_thread() -> None:
    bells = Bell(), Bell()

    def echo() -> None:
        for _ in range(200):
            assert bells[0].wait(60)
            bells[1].ring()

    thread = threading.Thread(target=echo)
    thread.start()
    for _ in range(200):
        bells[0].ring()
        assert bells[1].wait(60)
    thread.join()


def test_the_end_is_seen_soon_and_a_long_transfer_costs_few_looks_more() -> None:
    elapsed, looks = 0.0, 0
    while elapsed < 1.0:
        nap = moving_nap(elapsed)
        assert nap <= max(SHORT_NAP, elapsed / GROWTH)
        elapsed, looks = elapsed + nap, looks + 1
        if elapsed < 1e-3:
            assert looks <= 40
    assert looks <= 1.0 / BUSY_NAP + 40


class Held(LoopbackWire):
    """Counts looks; an operation is over when told."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()
        self.looks = 0

    def post(self, connection, rows, note=None):
        super().post(connection, rows)
        return rows

    def finished(self, operation):
        self.looks += operation is not None
        return operation is None or self.over.is_set()


def test_the_thread_naps_while_a_transfer_takes_long() -> None:
    wire = Held()
    with pair_on(wire, [8]) as pair:
        started = time.monotonic()
        transfer = pair.source.submit(pair.to_target, [[0, 0, 8]], None)
        while time.monotonic() - started < 0.3 or not wire.looks:
            time.sleep(0.01)
        looks, seconds = wire.looks, time.monotonic() - started
        # A look within a nap's time follows only where the thread lost its core inside the library, a few hundred times a
        # second.
        assert looks <= 1.5 * seconds / BUSY_NAP + 40
        wire.over.set()
        assert pair.done(transfer) == {transfer: "done"}
