"""Second copies of matrices, made in the background: a model serves at once, and faster a few seconds later."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Copies:
    """One thread that runs what it is given, in order, and ends when nothing is left or the interpreter exits."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, make: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append(make)
            if self._thread is None:
                # Not a daemon, as a child of a daemon would be: one that computes while Python is torn down crashes it.
                self._thread = threading.Thread(target=self._run, name="fluent-copies", daemon=False)
                self._thread.start()

    def wait(self) -> None:
        """Until all copies that were asked for are made."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while threading.main_thread().is_alive():
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                make = self._waiting.popleft()
            make()


COPIES = Copies()
"""Of this process."""
