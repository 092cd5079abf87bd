"""What the choice of a draft length knows of time: how long a step takes, for each program. Torch-free.

A program is (bucket of slots, drafts verified, drafts left). What it takes is measured whenever it runs without a prompt
beside it. Until then there are two guesses from programs that are known, of this bucket or another: what is expected, and what
it can hardly be shorter than. An `Allowance` is what finding out may cost.
"""

from __future__ import annotations

from collections import Counter, deque
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

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
        self._dropped = dropped
        self._runs: Counter[tuple[int, int, int]] = Counter()
        self._first: dict[tuple[int, int, int], list[float]] = {}
        """Runs that were dropped, and had no prompt beside them."""
        self._last: dict[tuple[int, int, int], deque[float]] = {}
        self._in_vain: dict[tuple[int, int, int], deque[float]] = {}
        self._known: dict[tuple[int, int, int], float] = {}
        self._lengths: dict[int, dict[int, float]] = {}
        """Bucket → K → what verifying and leaving K takes, where that is known."""
        self._stalls: deque[float] = deque(maxlen=KEPT)
        self._spent: dict[int, float] = {}
        self.measured: set[int] = set()
        """K that are known in any bucket. The plain step is the first."""

    def add(self, bucket: int, verify: int, draft: int, seconds: float | None, *, in_vain: bool = False) -> None:
        """A program has run, in so many seconds; None: with a prompt beside it. `in_vain`: it verifies drafts, and no sequence
        had one. Such rows take no experts, so this says little of what verifying takes."""
        key = bucket, verify, draft
        self._runs[key] += 1
        if seconds is None:
            return
        if self._runs[key] <= self._dropped:
            self._first.setdefault(key, []).append(seconds)
            return
        if in_vain:
            self._in_vain.setdefault(key, deque(maxlen=KEPT)).append(seconds)
            return
        last = self._last.setdefault(key, deque(maxlen=KEPT))
        last.append(seconds)
        self._spent[bucket] = self._spent.get(bucket, 0.0) + seconds
        if len(last) < ENOUGH:
            return
        time = _typical(last)
        first = self._first.pop(key, [])
        if first and len(first) == self._dropped:
            self._stalls.append(max(0.0, sum(first) - len(first) * time))
        self._know(key, time)
        plain = self._known.get((bucket, 0, 0))
        if not verify and plain is not None:
            # Without drafts to leave it is no longer; this one runs still when the plain one has not for long.
            self._know((bucket, 0, 0), min(plain, time))

    def _know(self, key: tuple[int, int, int], time: float) -> None:
        bucket, verify, draft = key
        self._known[key] = time
        if verify == draft:
            self._lengths.setdefault(bucket, {})[verify] = time
            self.measured.add(verify)

    def known(self, bucket: int, verify: int, draft: int) -> float | None:
        """The lower quartile of the last runs; None before there are enough."""
        return self._known.get((bucket, verify, draft))

    def lengths(self, bucket: int) -> Collection[int]:
        """K of which the time of verifying and leaving K is known."""
        return self._lengths.get(bucket, {})

    def runs(self, bucket: int, verify: int, draft: int) -> int:
        return self._runs[bucket, verify, draft]

    def in_vain(self, bucket: int, k: int) -> float:
        """What a program that verifies and leaves K takes where no sequence has a draft; infinite while that is not known."""
        runs = self._in_vain.get((bucket, k, k), ())
        return _typical(runs) if len(runs) >= ENOUGH else inf

    def runs_missing(self, bucket: int, k: int) -> tuple[int, int]:
        """Runs until the time of verifying and leaving K is known: those that do not count, then others."""
        key = bucket, k, k
        return max(0, self._dropped - self._runs[key]), max(0, ENOUGH - len(self._last.get(key, ())))

    @property
    def stall(self) -> float:
        """What the first runs of a program take beyond the time of as many others."""
        return _typical(self._stalls) if self._stalls else 0.0

    def spent(self, bucket: int) -> float:
        """What all steps of this bucket have taken, beside those that stalled or had a prompt with them."""
        return self._spent.get(bucket, 0.0)

    def expected(self, bucket: int, k: int) -> float:
        """What verifying and leaving K takes, as far as is known. Of a bucket of which nothing is, all times are those of the
        nearest: they say which K is best. K must be measured somewhere, or the plain step in this bucket be known."""
        if bucket not in self._lengths:
            bucket = min(self._lengths, key=lambda other: _distance(other, bucket))
        known = self._lengths[bucket].get(k)
        if known is None:
            known = self._elsewhere(bucket, k)
        return self._extrapolated(bucket, k) if known is None else known

    def shortest(self, bucket: int, k: int) -> float:
        """A time that verifying and leaving K can hardly be shorter than: fewer sequences or fewer drafts take no longer, and
        nobody would run a large batch at once that is faster in parts. Drafts also take about as much more as elsewhere."""
        bound = max(
            time / max(1, -(-other // bucket))
            for other, lengths in self._lengths.items()
            for fewer, time in lengths.items()
            if fewer <= k
        )
        elsewhere = self._elsewhere(bucket, k) if k else None
        return bound if elsewhere is None else max(bound, DOUBT * elsewhere)

    def drafting(self, bucket: int, draft: int) -> float:
        """What it takes to leave drafts."""
        plain = self._known.get((bucket, 0, 0))
        if plain is not None:
            for drafts in (draft, 1):
                known = self._known.get((bucket, 0, drafts))
                if known is not None:
                    return max(0.0, known - plain) * (draft / drafts if drafts else 0)
        return draft * DRAFT_SHARE * self.expected(bucket, 0)

    def leaving(self, bucket: int, verify: int, draft: int) -> float:
        """What a step takes that verifies and leaves so many, as far as is known."""
        known = self._known.get((bucket, verify, draft))
        if known is not None:
            return known
        return self.expected(bucket, verify) + self.drafting(bucket, draft) - self.drafting(bucket, verify)

    def _elsewhere(self, bucket: int, k: int) -> float | None:
        """As much longer than what is known here as at the nearest batch where both are known."""
        here = self._lengths.get(bucket, {})
        guesses = [
            (_distance(other, bucket), abs(j - k), here[j] * lengths[k] / lengths[j])
            for other, lengths in self._lengths.items()
            if other != bucket and k in lengths
            for j in here.keys() & lengths.keys()
        ]
        return min(guesses)[2] if guesses else None

    def _extrapolated(self, bucket: int, k: int) -> float:
        """Each draft more takes as much as the drafts before it did, or at first half a step."""
        lengths = self._lengths[bucket]
        if 0 not in lengths:
            fewest = min(lengths)
            plain = lengths[fewest] / (1 + ROW_SHARE * fewest)
            return plain * (1 + ROW_SHARE * k)
        plain = lengths[0]
        fewer = max(j for j in lengths if j < k)
        slope = (lengths[fewer] - plain) / fewer if fewer else ROW_SHARE * plain + self.drafting(bucket, 1)
        return lengths[fewer] + (k - fewer) * max(0.0, slope)


class Allowance:
    """Seconds that may be lost: a share of all time, saved up to be spent."""

    def __init__(self, share: float, first: float) -> None:
        """`first`: plain steps' time that it begins with."""
        self._share, self._first = share, first
        self._left = self._plain = 0.0

    def earn(self, seconds: float, plain: float) -> None:
        """A step has taken `seconds`, and a plain one of its batch takes `plain`. What is left stays as many plain steps: what
        many sequences have saved is not for few to spend at once."""
        left = self._left * plain / self._plain if self._plain else self._first * plain
        self._plain = plain
        self._left = max(left, min(left + self._share * seconds, SAVED * plain))

    def covers(self, seconds: float) -> bool:
        """All that can be saved is enough for anything."""
        return self._left >= min(seconds, SAVED * self._plain) and self._plain > 0

    def spend(self, seconds: float) -> None:
        """Less than nothing where it was a gain: that makes good for a loss, and is no more to spend. No loss, which may be the
        machine's, forbids spending for ever."""
        most = max(self._left, self._first * self._plain)
        self._left = max(min(self._left - seconds, most), -SAVED * self._plain / 2)


def _typical(times: Iterable[float]) -> float:
    """The lower quartile."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4]


def _distance(bucket: int, other: int) -> float:
    return max(bucket, other) / min(bucket, other)
