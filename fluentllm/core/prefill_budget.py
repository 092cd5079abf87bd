"""How many prompt tokens a step may hold while others decode, so that they wait at most a given multiple of their own step.

Without prompt tokens, a step of B sequences takes d(B). n tokens behind s others add c + a · n + b · n · (s + n / 2) + e · s:
what any pass takes, what a token takes, what it takes for each one that it looks back on, and what a pass takes for each token
in front of it, which it reads once, or expands (MLA). All are learned from the time of steps, by corrections in proportion to
the error (normalised least mean squares), so what steps do not tell apart stays as it was learned: along one long prompt,
tokens get dearer while chunks shrink and take the same time, which must not be taken for time that does not depend on tokens.

Where the host launches a pass more slowly than the device runs it, the step's time is the host's. It tells of the device
only that it was no slower: chunks that were cut because of it would take as long, be cut again, and end as crumbs. Whether
a step was the host's is seen by how long the device still worked when all was launched. Such steps tell in turn what
launching takes.

With r times d(B) allowed, the time beyond d(B) is at most (`AIM` · r - 1) · d(B), but never cut below two things that smaller
chunks would not spare: what the host takes to launch a pass; and where c + e · s is more than that, `WORTH` times as much, lest
nearly all of such a step be for nothing. (Less is not told apart: small chunks are the host's. As long as all passes were, c is
not known at all.)
"""

from __future__ import annotations

from collections import deque
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING

from .buckets import without_padding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .types import PrefillChunk, StepPlan, StepResult

WEIGHT = 0.2
"""Of a new measurement in a running mean."""
RATE = 0.3
"""Of an error that is corrected at once."""
OUTLIER = 0.5
"""A pass that took less than so much of what was expected tells that those before waited for something else, such as a
compiler: nothing makes a pass faster than it is. All of that error is corrected at once."""
AIM = 0.93
"""Of the ratio that is allowed: what a chunk takes is known to within a few in 100, and nearly all steps are to keep to it."""
WORTH = 1.5
"""A pass may take so many times what it takes whatever it holds. More would break the bound where it can be kept: a prompt
that gets on slowly is waited for by one, a late token by all."""
LEAST = 16
"""Tokens: a prompt gets on, whatever it costs others."""
PASS_TOKENS, CONTEXT = 256, 16384
"""Scales: errors of a chunk of PASS_TOKENS are c's as much as a's; of one behind CONTEXT tokens, a's as much as b's."""
LAUNCHES = 9
"""Passes whose median is what launching takes: some wait for a compiler or a capture."""
PROBE, PROBES = 0.5, 4
"""Every PROBES-th bounded chunk holds so much of what fits: chunks of different sizes tell what does not depend on size."""
HOST_BOUND = 0.1
"""A pass that kept the device for less than so much of its step once it was launched ran as fast as it was launched."""


class ChunkCost:
    """Seconds of chunks: c, a, b and e of the module's text, learned."""

    def __init__(self) -> None:
        self._rates: list[float] | None = None
        """Of PASS_TOKENS; of a token; of a token behind CONTEXT others; of PASS_TOKENS for CONTEXT others in front."""
        self.told = False
        """Has a pass been as slow as the device?"""
        self._shortest = float("inf")
        """Of any pass."""

    @property
    def known(self) -> bool:
        return self._rates is not None

    def fixed(self, start: int) -> float:
        """Of a pass behind `start` tokens, whatever it holds. c is never more than any pass has taken."""
        if self._rates is None:
            return 0.0
        return PASS_TOKENS * (self._rates[0] + self._rates[3] * start / CONTEXT)

    def of(self, start: int, count: int) -> float:
        """Of `count` tokens behind `start`, without what is fixed."""
        if self._rates is None:
            return 0.0
        return count * (self._rates[1] + self._rates[2] * (start + count / 2) / CONTEXT)

    def fitting(self, start: int, seconds: float) -> float:
        """How many tokens behind `start` take so long, without what is fixed."""
        if self._rates is None or seconds <= 0:
            return 0.0
        linear, half = self._rates[1] + self._rates[2] * start / CONTEXT, self._rates[2] / CONTEXT / 2
        root = sqrt(linear * linear + 4 * half * seconds)
        return 2 * seconds / (linear + root) if linear + root > 0 else float("inf")

    def learn(self, chunks: Iterable[PrefillChunk], seconds: float, *, at_most: bool) -> None:
        """What a pass took the device beyond decoding, or no more than."""
        tokens = context = before = 0.0
        for chunk in chunks:
            tokens += chunk.count
            context += chunk.count * (chunk.start + chunk.count / 2) / CONTEXT
            before += chunk.start * PASS_TOKENS / CONTEXT
        self._shortest = min(self._shortest, seconds)
        self.told |= not at_most
        scales = [PASS_TOKENS, tokens, context, before]
        if self._rates is None and at_most:
            scales[0] = 0.0  # of what the device did not take, nothing is known to be fixed
        rates = self._rates or [0.0] * len(scales)
        expected = sum(rate * scale for rate, scale in zip(rates, scales, strict=True))
        error = seconds - expected
        if self._rates is not None:
            if at_most and error >= 0:
                return
            if seconds > OUTLIER * expected:
                # One that waited for a compiler must not count for more than one that took twice as long as it should.
                error = RATE * min(error, expected)
        if error < 0:
            scales = [scale if rate > 0 else 0.0 for rate, scale in zip(rates, scales, strict=True)]
        size = sum(scale * scale for scale in scales)
        rates = [max(0.0, rate + error * scale / size) for rate, scale in zip(rates, scales, strict=True)] if size else rates
        rates[0] = min(rates[0], self._shortest / PASS_TOKENS)
        self._rates = rates


class StepAllowance:
    """What one step may still hold: so many tokens, and chunks that take so many `seconds` beyond decoding (None: no bound), or
    `floor`; of what fits, `part`."""

    def __init__(
        self,
        tokens: int,
        seconds: float | None,
        cost: ChunkCost,
        floor: Callable[[int], float],
        part: float = 1.0,
        *,
        padded: bool = False,
    ) -> None:
        """padded: passes are, so that a chunk which is cut ends where there is no padding."""
        self._tokens, self._seconds, self._cost, self._floor, self._part = tokens, seconds, cost, floor, part
        self._padded = padded
        self._taken = 0
        self._begun = False

    @property
    def open(self) -> bool:
        """Is it worth while to begin another prompt?"""
        return self._tokens > 0 and (not self._begun or self._fitting(0) >= min(self._tokens, LEAST))

    def take(self, start: int, wanted: int) -> int:
        """Tokens of a chunk behind `start`, at most `wanted`; the first gets LEAST at least, others may get none."""
        least = 0
        if not self._begun:
            least = min(self._tokens, LEAST)
            if self._seconds is not None:
                self._seconds = max(self._seconds, self._floor(start)) - self._cost.fixed(0)
        count = min(wanted, max(least, int(self._part * self._fitting(start))))
        if self._padded and count < wanted:
            count = max(least, without_padding(self._taken + count) - self._taken)
        if count > 0:
            self._begun = True
            self._taken += count
            self._tokens -= count
            if self._seconds is not None:
                self._seconds -= self._cost.of(start, count) + self._in_front(start)
        return count

    def _fitting(self, start: int) -> int:
        if self._seconds is None:
            return self._tokens
        return int(min(self._tokens, self._cost.fitting(start, self._seconds - self._in_front(start))))

    def _in_front(self, start: int) -> float:
        return self._cost.fixed(start) - self._cost.fixed(0)


class PrefillBudget:
    """`most` tokens where nobody decodes, or without a `ratio` (> 1). Torch-free; fed by the engine with collected steps."""

    def __init__(self, most: int, ratio: float | None, *, padded: bool = False) -> None:
        """padded: passes are (`buckets.pass_rows`)."""
        self.most = most
        self._padded = padded
        self.ratio = ratio
        self._decode: dict[int, float] = {}
        """Bucket of sequences → seconds of a step without prompt tokens."""
        self._cost = ChunkCost()
        self._launching: deque[float] = deque(maxlen=LAUNCHES)
        self._steps = 0
        """Bounded ones."""

    @property
    def launching(self) -> float:
        """Seconds that the host takes to launch a pass."""
        return median(self._launching) if self._launching else 0.0

    def floor(self, start: int) -> float:
        """Seconds that a step with prompt tokens behind `start` may add, whatever the ratio."""
        known = self._cost.fixed(start) - (0.0 if self._cost.told else self._cost.fixed(0))
        return max(self.launching, WORTH * known if known > self.launching else 0.0)

    def allow(self, decoding: int) -> StepAllowance:
        """For a step in which `decoding` sequences decode."""
        step = self._decode.get(_bucket(decoding))
        if self.ratio is None or not decoding or step is None or not self._cost.known:
            return StepAllowance(self.most, None, self._cost, self.floor, padded=self._padded)
        self._steps += 1
        part = PROBE if self._steps % PROBES == 0 else 1.0
        seconds = max(0.0, AIM * self.ratio - 1) * step
        return StepAllowance(self.most, seconds, self._cost, self.floor, part, padded=self._padded)

    def tokens(self, decoding: int, start: int = 0) -> int:
        """The same where one prompt is all there is, of which `start` tokens are computed."""
        return self.allow(decoding).take(start, self.most)

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        bucket = _bucket(len(plan.decode))
        if not plan.prefill:
            self._decode[bucket] = _mean(self._decode.get(bucket), result.seconds)
            return
        alone = self._decode.get(bucket) if plan.decode else 0.0
        by_host = result.launching > 0 and result.behind - (alone or 0.0) < HOST_BOUND * result.seconds
        if by_host or 0 < result.launching < self.launching:  # else it may have waited for room in the device's queue
            self._launching.append(result.launching)
        if alone is not None:
            self._cost.learn(plan.prefill, max(0.0, result.seconds - alone), at_most=by_host)


def _mean(known: float | None, new: float) -> float:
    """Running, but for what shows that those before were none (`OUTLIER`)."""
    return new if known is None or new < OUTLIER * known else known + WEIGHT * (new - known)


def _bucket(sequences: int) -> int:
    """The next power of two."""
    return 1 << max(0, sequences - 1).bit_length()
