"""How many prompt tokens a step may hold while others decode, so that they wait at most a given multiple of their own step.

A step of B sequences without prompt tokens takes d(B). A chunk of n tokens behind s adds c + a · n + b · n · (s + n / 2):
what any pass takes, what a token takes, and what a token takes for each one that it looks back on. All are learned from the
time of steps, by corrections in proportion to the error (normalised least mean squares), so what steps do not tell apart stays
as it was learned: along one long prompt, tokens get dearer while chunks shrink and take the same time, and that must not be
taken for time that does not depend on tokens.

With r times d(B) allowed, the time beyond d(B) is at most (r - 1) · d(B), but never cut below two things that smaller chunks
would not spare: what the host takes to launch a pass kernel by kernel, while the device still works on the step before; and
twice c, for half of such a step would be for nothing. Passes that all were launched more slowly than they ran tell no c.
"""

from __future__ import annotations

from collections import deque
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .types import PrefillChunk, StepPlan, StepResult

WEIGHT = 0.2
"""Of a new measurement in a running mean."""
RATE = 0.3
"""Of an error that is corrected at once."""
LEAST = 16
"""Tokens: a prompt gets on, whatever it costs others."""
PASS_TOKENS, CONTEXT = 256, 16384
"""Scales: errors of a chunk of PASS_TOKENS are c's as much as a's; of one behind CONTEXT tokens, a's as much as b's."""
LAUNCHES = 32
"""Passes of which the one that was launched fastest counts: others wait for a compiler, a capture or a full queue."""
HOST_BOUND = 1.1
"""Steps below so many times the launching time tell nothing of the device but that it was no slower."""


class Cost:
    """Seconds of chunks: c, a and b of the module's text, learned."""

    def __init__(self) -> None:
        self._rates: list[float] | None = None
        """Of PASS_TOKENS, of a token, and of a token behind CONTEXT others."""
        self.shortest = float("inf")
        """Of any pass."""

    @property
    def known(self) -> bool:
        return self._rates is not None

    @property
    def fixed(self) -> float:
        """c, which is never more than any pass has taken."""
        return self._rates[0] * PASS_TOKENS if self._rates is not None else 0.0

    def of(self, start: int, count: int) -> float:
        """Of `count` tokens behind `start`, without c."""
        if self._rates is None:
            return 0.0
        _, token, context = self._rates
        return count * (token + context * (start + count / 2) / CONTEXT)

    def fitting(self, start: int, seconds: float) -> float:
        """How many tokens behind `start` take so long, without c."""
        if self._rates is None or seconds <= 0:
            return 0.0
        linear, half = self._rates[1] + self._rates[2] * start / CONTEXT, self._rates[2] / CONTEXT / 2
        root = sqrt(linear * linear + 4 * half * seconds)
        return 2 * seconds / (linear + root) if linear + root > 0 else float("inf")

    def learn(self, chunks: Iterable[PrefillChunk], seconds: float, launching: float) -> None:
        """What a pass took beyond decoding, and what launching takes the host."""
        tokens = context = 0.0
        for chunk in chunks:
            tokens += chunk.count
            context += chunk.count * (chunk.start + chunk.count / 2) / CONTEXT
        self.shortest = min(self.shortest, seconds)
        scales = [PASS_TOKENS, tokens, context]
        rates = self._rates or [0.0, 0.0, 0.0]
        expected = sum(rate * scale for rate, scale in zip(rates, scales, strict=True))
        error = seconds - expected
        if self._rates is not None:
            if seconds <= HOST_BOUND * launching and error >= 0:
                return
            # One that waited for a compiler must not count for more than one that took twice as long as it should.
            error = RATE * min(error, expected)
        if error < 0:
            scales = [scale if rate > 0 else 0.0 for rate, scale in zip(rates, scales, strict=True)]
        size = sum(scale * scale for scale in scales)
        rates = [max(0.0, rate + error * scale / size) for rate, scale in zip(rates, scales, strict=True)] if size else rates
        rates[0] = min(rates[0], self.shortest / PASS_TOKENS)
        self._rates = rates


class Allowance:
    """What one step may still hold. `seconds`: beyond decoding, without c; None for no bound."""

    def __init__(self, tokens: int, seconds: float | None, cost: Cost) -> None:
        self._tokens, self._seconds, self._cost = tokens, seconds, cost
        self._begun = False

    @property
    def open(self) -> bool:
        """Is it worth while to begin another prompt?"""
        return self._fitting(0) >= (LEAST if self._begun else 1)

    def take(self, start: int, wanted: int) -> int:
        """Tokens of a chunk behind `start`, at most `wanted`; the first gets LEAST at least, others may get none."""
        count = self._fitting(start)
        if not self._begun:
            count = min(self._tokens, max(LEAST, count))
        count = min(count, wanted)
        self._begun = self._begun or count > 0
        self._tokens -= count
        if self._seconds is not None:
            self._seconds -= self._cost.of(start, count)
        return count

    def _fitting(self, start: int) -> int:
        if self._seconds is None:
            return self._tokens
        return int(min(self._tokens, self._cost.fitting(start, self._seconds)))


class PrefillBudget:
    """`most` tokens where nobody decodes, or without a `ratio` (> 1). Torch-free; fed by the engine with collected steps."""

    def __init__(self, most: int, ratio: float | None) -> None:
        self.most = most
        self.ratio = ratio
        self._decode: dict[int, float] = {}
        """Bucket of sequences → seconds of a step without prompt tokens."""
        self._cost = Cost()
        self._launching: deque[float] = deque(maxlen=LAUNCHES)

    @property
    def floor(self) -> float:
        """Seconds that a step with prompt tokens may add, whatever the ratio."""
        told = self._cost.shortest > HOST_BOUND * self.launching
        return max(self.launching, 2 * self._cost.fixed if told else 0.0)

    @property
    def launching(self) -> float:
        """Seconds that the host takes to launch a pass, if nothing holds it up."""
        return min(self._launching, default=0.0)

    def allow(self, decoding: int) -> Allowance:
        """For a step in which `decoding` sequences decode."""
        step = self._decode.get(_bucket(decoding))
        if self.ratio is None or not decoding or step is None or not self._cost.known:
            return Allowance(self.most, None, self._cost)
        allowed = max((self.ratio - 1) * step, self.floor)
        return Allowance(self.most, allowed - self._cost.fixed, self._cost)

    def tokens(self, decoding: int, start: int = 0) -> int:
        """The same where one prompt is all there is, of which `start` tokens are computed."""
        return self.allow(decoding).take(start, self.most)

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        bucket = _bucket(len(plan.decode))
        if not plan.prefill:
            self._decode[bucket] = _mean(self._decode.get(bucket), result.seconds)
            return
        if result.launching > 0:
            self._launching.append(result.launching)
        alone = self._decode.get(bucket) if plan.decode else 0.0
        if alone is not None:
            self._cost.learn(plan.prefill, max(0.0, result.seconds - alone), self.launching)


def _mean(known: float | None, new: float) -> float:
    return new if known is None else known + WEIGHT * (new - known)


def _bucket(sequences: int) -> int:
    """The next power of two."""
    return 1 << max(0, sequences - 1).bit_length()
