"""The thread that does Mooncake's blocking calls one after another."""

from __future__ import annotations

import threading
import weakref

import pytest

from fluentllm.plugins.kv_mooncake.lane import Lane


class Engine:
    def call(self) -> None:
        pass


def test_calls_run_in_order_and_errors_are_theirs() -> None:
    lane, done = Lane(), []

    def fail() -> None:
        raise OSError("no peer")

    first, second, third = lane.submit(done.append, 1), lane.submit(fail), lane.submit(done.append, 2)
    third.result(10)
    assert done == [1, 2]
    assert first.exception() is None
    with pytest.raises(OSError, match="no peer"):
        second.result()
    lane.end()


def test_nothing_is_kept_alive_by_what_is_done() -> None:
    lane, engine = Lane(), Engine()
    gone = threading.Event()
    weakref.finalize(engine, gone.set)
    lane.submit(engine.call).result(10)
    del engine
    assert gone.wait(10), "an idle lane holds the engine of its last call"
    lane.end()
