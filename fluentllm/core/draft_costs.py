"""What the choice of a draft length knows: how long steps take, and how often drafts are right. Torch-free.

Times are kept for each program, (bucket of slots, K); survival, the share of sequences whose first j drafts are all right,
for each class of requests: a proposer may guess greedy requests well and sampled ones, or those with a grammar, badly.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from .types import SamplingParams

DROPPED = 2
"""First runs of a program that do not count: one compiles and warms caches, on a GPU the next is captured."""
TRIALS = DROPPED + 2
"""Runs of a program that tell what it takes."""
KEPT = 9
"""Runs whose median is the time of a program: one that was interrupted does not matter."""
DOUBT = 0.85
"""What a program takes is known to this share from the same one at another batch."""
WINDOW = 128
"""Sequences' steps that a running share remembers."""


class StepTimes:
    """Seconds of steps that verify and leave K drafts."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], int] = {}
        self._last: dict[tuple[int, int], deque[float]] = {}
        self._median: dict[tuple[int, int], float] = {}

    def add(self, bucket: int, k: int, seconds: float) -> None:
        key = bucket, k
        runs = self._runs[key] = self._runs.get(key, 0) + 1
        if runs > DROPPED:
            last = self._last.setdefault(key, deque(maxlen=KEPT))
            last.append(seconds)
            if runs >= TRIALS:
                self._median[key] = median_low(last)

    def known(self, bucket: int, k: int) -> float | None:
        """The median of the last runs; None before there are enough."""
        return self._median.get((bucket, k))

    def least(self, bucket: int, k: int) -> float:
        """A time that K can hardly be faster than: that of fewer drafts, or by how much more it took at the nearest batch."""
        times = [self._median.get((bucket, fewer), 0.0) for fewer in range(k)]
        plain, other = self._median.get((bucket, 0)), self._nearest(bucket, k)
        if plain is not None and other is not None:
            times.append(DOUBT * plain * self._median[other, k] / self._median[other, 0])
        return max(times)

    def _nearest(self, bucket: int, k: int) -> int | None:
        others = (b for b, drafts in self._median if drafts == k and b != bucket and (b, 0) in self._median)
        return min(others, key=lambda b: max(b, bucket) / min(b, bucket), default=None)


class Survival:
    """s_1 … s_K for each class: running means over sequences."""

    def __init__(self, max_k: int) -> None:
        self._max_k = max_k
        self._shares: dict[Hashable, list[float]] = {}
        self._seen: dict[Hashable, list[int]] = {}

    def add(self, kind: Hashable, accepted: Sequence[int], k: int) -> None:
        """`accepted`: of each sequence of a class, how many of `k` drafts were right."""
        if kind not in self._shares:
            self._shares[kind], self._seen[kind] = self._pooled(), [0] * self._max_k
        shares, seen = self._shares[kind], self._seen[kind]
        for j in range(k):
            seen[j] = min(seen[j] + len(accepted), WINDOW)
            weight = min(1.0, len(accepted) / seen[j])
            shares[j] += weight * (sum(count > j for count in accepted) / len(accepted) - shares[j])

    def forget(self, first: int, kept: int) -> None:
        """Let what comes soon count as much as all but `kept` of what was seen, from draft `first` on."""
        for seen in self._seen.values():
            seen[first:] = [min(count, kept) for count in seen[first:]]

    def tokens(self, mix: Mapping[Hashable, int], k: int) -> float:
        """Tokens that a sequence gets on average by a step with K drafts, where `mix` counts the sequences of each class."""
        total = sum(mix.values())
        if not total:
            return 1 + sum(self._pooled()[:k])
        return 1 + sum(n * sum(self._of(kind)[:k]) for kind, n in mix.items()) / total

    def _of(self, kind: Hashable) -> list[float]:
        """What is not known of a class is taken from the others."""
        return self._shares.get(kind) or self._pooled()

    def _pooled(self) -> list[float]:
        known = list(self._shares.values())
        return [sum(column) / len(known) for column in zip(*known, strict=True)] if known else [0.0] * self._max_k


def class_of(params: SamplingParams) -> tuple[bool, bool]:
    """Sampled? With a grammar?"""
    return params.temperature > 0, params.grammar is not None
