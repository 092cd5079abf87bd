"""A circuit breaker: whoever fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal


class Breaker:
    """Opens after some failures in a row; after a while it lets one try through (half open), which closes or opens it."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._seconds, self._clock = failures, seconds, clock
        self._failures = 0
        self._opened: float | None = None
        self._trying = False

    @property
    def state(self) -> Literal["closed", "open", "half open"]:
        if self._opened is None:
            return "closed"
        return "half open" if self._clock() - self._opened >= self._seconds else "open"

    def allows(self) -> bool:
        """Whether to try now. True when half open is a promise to report how it went."""
        if self.state == "half open" and not self._trying:
            self._trying = True
            return True
        return self._opened is None

    def succeeded(self) -> None:
        self._failures, self._opened, self._trying = 0, None, False

    def forgo(self) -> None:
        """Who was let through does not try after all."""
        self._trying = False

    def failed(self) -> None:
        self._failures += 1
        if self._trying or self._failures >= self._limit:
            self._opened, self._trying = self._clock(), False
