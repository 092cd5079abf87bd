"""How much is under way to a peer: as many rows and bytes as the window's full chunks have, in posts of any size."""

from __future__ import annotations

import threading
import time

import pytest

from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing.bench import copied
from fluentllm.transfer import channel as channels
from fluentllm.transfer.channel import MOST_UNDER_WAY

from .pairs import pair_on

WINDOW, BYTES, ROWS = 3, 8, 4


class Held(LoopbackWire):
    """Writes at once; nothing is over until it is told, one by one or all."""

    window, chunk_bytes, chunk_rows, quick_bytes = WINDOW, BYTES, ROWS, 0

    def __init__(self) -> None:
        super().__init__()
        self.posts: list[int] = []
        self.over: set[int] = set()
        self.all_over = threading.Event()

    def post(self, connection, rows, note=None):
        super().post(connection, rows)
        self.posts.append(len(rows))
        return len(self.posts)

    def finished(self, operation):
        return operation is None or operation in self.over or self.all_over.is_set()

    def settled(self) -> int:
        """Posts by the time that no more come."""
        count, since = -1, 0.0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len(self.posts) != count:
                count, since = len(self.posts), time.monotonic()
            elif time.monotonic() - since > 0.05:
                return count
            time.sleep(0.002)
        raise AssertionError("posts without end")


@pytest.mark.parametrize(
    ("rows", "length", "most"),
    [
        (1, 1, WINDOW * ROWS),  # as many rows as three chunks have
        (1, BYTES, WINDOW),
        (1, BYTES // 2 + 1, WINDOW * BYTES // (BYTES // 2 + 1)),
        (ROWS, 1, WINDOW),
        (3, 1, WINDOW * ROWS // 3),
    ],
)
def test_small_posts_fill_the_window_and_large_ones_do_not_exceed_it(rows: int, length: int, most: int) -> None:
    wire = Held()
    with pair_on(wire, [64]) as pair:
        source, before = pair.source.memory(), pair.target.memory()
        writes = [[i * length, 63 - (i + 1) * length, length] for i in range(rows)]
        transfers = [pair.source.submit(pair.to_target, writes, None) for _ in range(most + 5)]
        assert wire.settled() == most
        wire.over |= {1, 2}
        assert wire.settled() == most + 2, "as many more as are over"
        wire.all_over.set()
        assert pair.done(*transfers) == dict.fromkeys(transfers, "done")
        assert pair.target.memory() == copied(before, source, writes)


def test_the_smallest_are_many_but_not_without_end() -> None:
    class Wide(Held):
        chunk_rows = 1024
        chunk_bytes = 1024

    wire = Wide()
    with pair_on(wire, [8]) as pair:
        transfers = [pair.source.submit(pair.to_target, [[0, 0, 1]], None) for _ in range(MOST_UNDER_WAY + 9)]
        assert wire.settled() == MOST_UNDER_WAY
        wire.all_over.set()
        assert pair.done(*transfers) == dict.fromkeys(transfers, "done")


def test_cancelled_ones_behind_a_full_window_are_never_posted() -> None:
    wire = Held()
    with pair_on(wire, [64]) as pair:
        transfers = [pair.source.submit(pair.to_target, [[0, 0, BYTES]], None) for _ in range(WINDOW + 2)]
        assert wire.settled() == WINDOW
        pair.source.cancel(transfers[WINDOW])
        assert pair.done(transfers[WINDOW]) == {transfers[WINDOW]: "cancelled"}
        wire.all_over.set()
        rest = transfers[:WINDOW] + transfers[WINDOW + 1 :]
        assert pair.done(*rest) == dict.fromkeys(rest, "done")
        assert len(wire.posts) == WINDOW + 1


def test_posting_stops_now_and_then_for_what_else_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four that the thread finds at once, those that are cancelled while it posts the first are not posted."""
    monkeypatch.setattr(channels, "POST_FOR", 0.0)

    class Slow(Held):
        def __init__(self) -> None:
            super().__init__()
            self.looking, self.look, self.posting, self.go_on = (threading.Event() for _ in range(4))
            self.look.set()

        def received(self):
            if not self.look.is_set():
                self.looking.set()
                assert self.look.wait(60)
            return super().received()

        def post(self, connection, rows, note=None):
            self.posting.set()
            assert self.go_on.wait(60)
            return super().post(connection, rows)

    wire = Slow()
    with pair_on(wire, [64]) as pair:
        wire.look.clear()
        assert wire.looking.wait(60)
        transfers = [pair.source.submit(pair.to_target, [[0, 0, 1]], None) for _ in range(4)]
        wire.look.set()
        assert wire.posting.wait(60)
        for transfer in transfers[1:]:
            pair.source.cancel(transfer)
        wire.go_on.set()
        assert pair.done(*transfers[1:]) == dict.fromkeys(transfers[1:], "cancelled")
        wire.all_over.set()
        assert pair.done(transfers[0]) == {transfers[0]: "done"}
        assert len(wire.posts) == 1
