"""What the choice of a draft length knows of time: how long a step takes, for each program. Torch-free.

A program is (bucket of slots, drafts verified, drafts left). What it takes is measured whenever it runs without a prompt
beside it; until then there are two guesses, from the programs that are known: what it may well take, and what it can
hardly be shorter than. An `Allowance` is what finding out may cost.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ENOUGH = 2
"""Runs of a program that tell what it takes: of two the shorter, so one that was interrupted does not matter."""
KEPT = 9
"""Runs whose lower quartile is the time of a program: what comes between only makes a step longer."""
DOUBT = 0.85
"""What a program takes is known to this share from the same one at another batch."""
SAVED = 8
"""Plain steps' time that an allowance saves at most."""
ROW_SHARE = 0.5
"""Of a plain step: what verifying one draft may take, before it was seen; between nothing and a step."""
DRAFT_SHARE = 0.25
"""Of a plain step: what a draft may take to make, before it was seen."""


class StepTimes:
    """Seconds of steps."""

    def __init__(self, dropped: int) -> None:
        """`dropped`: first runs of a program that do not count: they warm caches, compile, and on a GPU capture."""
        self.dropped = dropped
        self._runs: dict[tuple[int, int, int], int] = {}
        self._last: dict[tuple[int, int, int], deque[float]] = {}
        self._known: dict[tuple[int, int, int], float] = {}
        self._lengths: dict[int, list[int]] = {}

    @property
    def runs_needed(self) -> int:
        """Runs in a row that make a program known."""
        return self.dropped + ENOUGH

    def add(self, bucket: int, verify: int, draft: int, seconds: float) -> None:
        key = bucket, verify, draft
        runs = self._runs[key] = self._runs.get(key, 0) + 1
        if runs > self.dropped:
            last = self._last.setdefault(key, deque(maxlen=KEPT))
            last.append(seconds)
            if runs >= self.runs_needed:
                if verify == draft and key not in self._known:
                    self._lengths.setdefault(bucket, []).append(verify)
                time = self._known[key] = sorted(last)[len(last) // 4]
                plain = self._known.get((bucket, 0, 0))
                if not verify and plain is not None:
                    # Without drafts to leave it is no longer; this one runs still when the plain one has not for long.
                    self._known[bucket, 0, 0] = min(plain, time)

    def known(self, bucket: int, verify: int, draft: int) -> float | None:
        """The lower quartile of the last runs; None before there are enough."""
        return self._known.get((bucket, verify, draft))

    def lengths(self, bucket: int) -> Sequence[int]:
        """K of which the time of verifying and leaving K is known."""
        return self._lengths.get(bucket, ())

    def drafting(self, bucket: int, draft: int) -> float:
        """What it takes to leave drafts. The plain step must be known."""
        plain = self._known[bucket, 0, 0]
        known = self._known.get((bucket, 0, draft))
        if known is not None:
            return max(0.0, known - plain)
        one = self._known.get((bucket, 0, 1))
        return draft * (plain * DRAFT_SHARE if one is None else max(0.0, one - plain))

    def shortest(self, bucket: int, k: int) -> float:
        """A time that verifying and leaving K can hardly be shorter than: that of fewer drafts, or by how much more it took at
        the nearest batch. The plain step must be known."""
        times = [time for fewer in range(k) if (time := self._known.get((bucket, fewer, fewer))) is not None]
        elsewhere = self._elsewhere(bucket, k)
        return max(times) if elsewhere is None else max(*times, DOUBT * elsewhere)

    def likely(self, bucket: int, k: int) -> float:
        """What verifying and leaving K may well take: each draft more as much as the drafts before it did, or at first half a
        step. The plain step must be known."""
        plain = self._known[bucket, 0, 0]
        fewer = max(j for j in self.lengths(bucket) if j < k)
        time = self._known[bucket, fewer, fewer]
        slope = (time - plain) / fewer if fewer else ROW_SHARE * plain + self.drafting(bucket, 1)
        guess = time + (k - fewer) * max(0.0, slope)
        elsewhere = self._elsewhere(bucket, k)
        return guess if elsewhere is None else min(guess, elsewhere / DOUBT)

    def leaving(self, bucket: int, verify: int, draft: int) -> float:
        """What a step takes that verifies and leaves so many, as far as is known. The plain step must be known."""
        known = self._known.get((bucket, verify, draft))
        if known is not None:
            return known
        time = self._known.get((bucket, verify, verify))
        if time is None:
            time = self.likely(bucket, verify)
        return time + self.drafting(bucket, draft) - self.drafting(bucket, verify)

    def _elsewhere(self, bucket: int, k: int) -> float | None:
        """As much more than the plain step as at the nearest batch where both are known."""
        known = [b for b, verify, draft in self._known if verify == draft == k and b != bucket and (b, 0, 0) in self._known]
        if not known:
            return None
        nearest = min(known, key=lambda b: max(b, bucket) / min(b, bucket))
        return self._known[bucket, 0, 0] * self._known[nearest, k, k] / self._known[nearest, 0, 0]


class Allowance:
    """Seconds that may be lost: a share of all time, saved up to be spent."""

    def __init__(self, share: float, first: float) -> None:
        """`first`: plain steps' time that it begins with."""
        self._share, self._first = share, first
        self._left = self._start = self._most = 0.0

    def earn(self, seconds: float, plain: float) -> None:
        """A step has taken `seconds`, and a plain one of its batch takes `plain`."""
        if not self._most:
            self._left = self._first * plain
        self._start, self._most = self._first * plain, SAVED * plain
        self._left = max(self._left, min(self._left + self._share * seconds, self._most))

    def covers(self, seconds: float) -> bool:
        """All that can be saved is enough for anything."""
        return self._left >= min(seconds, self._most) and self._most > 0

    def spend(self, seconds: float) -> None:
        """Less than nothing where it was a gain: that makes good for a loss, and is no more to spend. No loss, which may be the
        machine's, forbids spending for ever."""
        self._left = max(min(self._left - seconds, max(self._left, self._start)), -self._most / 2)
