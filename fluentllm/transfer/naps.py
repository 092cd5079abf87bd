"""Sleeping no longer than asked."""

from __future__ import annotations

import ctypes
import sys

SET_TIMER_SLACK = 29
"""`PR_SET_TIMERSLACK` of Linux, prctl(2)."""


def sleep_precisely() -> None:
    """For the calling thread, on Linux: timers end on time. By default each may be 50 µs late, so that the kernel can wake
    several sleepers together. Elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_TIMER_SLACK, ctypes.c_ulong(1), 0, 0, 0)
