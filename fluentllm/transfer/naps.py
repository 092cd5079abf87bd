"""How a thread that polls a library waits between looks: a bell that ends a nap, naps that end on time, and how long."""

from __future__ import annotations

import ctypes
import sys
import threading

BUSY_NAP, EAGER_NAP, IDLE_NAP = 100e-6, 250e-6, 1e-3
"""Seconds between looks at the library: something moves, something is expected, nothing is."""
SHORT_NAP, GROWTH = 10e-6, 8
"""After a transfer is handed over a nap lasts this long, then a GROWTHth of the time that has gone by since, up to BUSY_NAP:
the end of a short transfer is seen soon after it, and a long one costs some thirty looks more than with BUSY_NAP alone."""
PR_SET_TIMERSLACK = 29


class Bell:
    """Ends the nap of one thread; rung while nobody naps, the next nap. A bare lock: an Event costs several a nap."""

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        try:
            self._silent.release()
        except RuntimeError:
            return  # it rings already

    def wait(self, seconds: float) -> bool:
        """Nap, at most for this long. Returns whether it rang. One thread only."""
        return self._silent.acquire(timeout=seconds)


def keep_time() -> None:
    """Let naps of the calling thread end on time: Linux adds up to 50 µs to a thread's naps unless told otherwise."""
    if sys.platform == "linux":
        # What it returns does not matter: a kernel that refuses leaves naps longer.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def moving_nap(elapsed: float) -> float:
    """Seconds to nap while something moves, `elapsed` seconds after the last transfer was handed over."""
    return min(max(elapsed / GROWTH, SHORT_NAP), BUSY_NAP)
