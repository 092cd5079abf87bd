"""Transfers of few rows and bytes are posted by the thread that submits them, if the transport's own is not at it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

from fluentllm.core.transport import PeerDied
from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing.bench import copied
from fluentllm.transfer.polled import FEW_ROWS

from .pairs import pair_on

SIZE = 4 * FEW_ROWS


class Written(LoopbackWire):
    """Writes down who posted; without `go_on` the thread is held up inside the library."""

    def __init__(self) -> None:
        super().__init__()
        self.posts: list[tuple[int, int]] = []
        self.thread = 0
        self.borrowers: list[int] = []
        self.go_on, self.inside = threading.Event(), threading.Event()
        self.go_on.set()

    @contextmanager
    def lent(self):
        self.borrowers.append(threading.get_ident())
        yield

    def post(self, connection, rows, note=None):
        self.posts.append((threading.get_ident(), len(rows)))
        super().post(connection, rows)

    def received(self):
        self.thread = threading.get_ident()
        if not self.go_on.is_set():
            self.inside.set()
            assert self.go_on.wait(60)
        return super().received()


def rows_of(count: int) -> list[list[int]]:
    return [[i, SIZE - 2 * i - 2, 1] for i in range(count)]


def test_few_rows_are_posted_by_the_caller_and_more_by_the_thread() -> None:
    wire = Written()
    with pair_on(wire, [SIZE]) as pair:
        for count in (1, 3, FEW_ROWS, FEW_ROWS + 1):
            source, before = pair.source.memory(), pair.target.memory()
            here = 0
            for _ in range(50):  # the thread may be in a turn just then
                transfer = pair.source.submit(pair.to_target, rows_of(count), b"written")
                assert pair.done(transfer) == {transfer: "done"}
                here += wire.posts[-1] == (threading.get_ident(), count)
                assert len(pair.notes(1)) == 1
            assert bool(here) == (count <= FEW_ROWS)
            assert pair.target.memory() == copied(before, source, rows_of(count))
        assert {thread for thread, _ in wire.posts} <= {threading.get_ident(), wire.thread}
        assert set(wire.borrowers) == {threading.get_ident()}


def test_few_rows_of_many_bytes_are_the_threads() -> None:
    wire = Written()
    wire.quick_bytes = 2
    with pair_on(wire, [SIZE]) as pair:
        for _ in range(20):
            transfer = pair.source.submit(pair.to_target, [[0, 0, 2], [2, 2, 1]], None)
            assert pair.done(transfer) == {transfer: "done"}
        assert {thread for thread, _ in wire.posts} == {wire.thread}


def test_nobody_posts_before_what_waits_for_room() -> None:
    class Full(Written):
        window, chunk_rows = 1, 2
        over = threading.Event()

        def post(self, connection, rows, note=None):
            super().post(connection, rows)
            return rows

        def finished(self, operation):
            return operation is None or self.over.is_set()

    wire = Full()
    with pair_on(wire, [SIZE]) as pair:
        transfers = [pair.source.submit(pair.to_target, rows_of(2), None) for _ in range(2)]
        time.sleep(0.01)
        transfers.append(pair.source.submit(pair.to_target, rows_of(1), None))
        wire.over.set()
        assert pair.done(*transfers) == dict.fromkeys(transfers, "done")
        assert [count for _, count in wire.posts] == [2, 2, 1]
        assert wire.posts[2][0] == wire.thread, "it waits behind the second"


def test_nobody_overtakes_what_waits_for_the_thread() -> None:
    wire = Written()
    with pair_on(wire, [SIZE]) as pair:
        wire.go_on.clear()
        assert wire.inside.wait(60)
        first = pair.source.submit(pair.to_target, rows_of(2), None)
        second = pair.source.submit(pair.to_target, rows_of(1), None)
        assert not wire.posts, "the library is the thread's"
        wire.go_on.set()
        assert pair.done(first, second) == {first: "done", second: "done"}
        assert wire.posts == [(wire.thread, 2), (wire.thread, 1)]


def test_a_peer_that_dies_in_the_callers_hands_is_told_as_ever() -> None:
    class Dying(Written):
        dead = False

        def post(self, connection, rows, note=None):
            super().post(connection, rows, note)
            if self.dead:
                raise PeerDied("It is gone.")

    wire = Dying()
    with pair_on(wire, [SIZE]) as pair:
        time.sleep(0.01)
        wire.dead = True
        transfer = pair.source.submit(pair.to_target, rows_of(1), None)
        assert [event[1:3] for event in pair.gone() if event[0] == "done"] == [(transfer, "failed")]
