"""Timers of a thread that looks at a transfer library."""

from __future__ import annotations

import ctypes
import sys
import threading

import pytest

from fluentllm.transfer.naps import sleep_precisely

GET_TIMER_SLACK = 30


@pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
def test_of_the_calling_thread_alone() -> None:
    """In nanoseconds."""
    prctl = ctypes.CDLL(None).prctl
    before = prctl(GET_TIMER_SLACK, 0, 0, 0, 0)
    found: list[int] = []

    def run() -> None:
        sleep_precisely()
        found.append(prctl(GET_TIMER_SLACK, 0, 0, 0, 0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1]
    assert prctl(GET_TIMER_SLACK, 0, 0, 0, 0) == before
