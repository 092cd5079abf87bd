"""How many prompt tokens a step may hold while others decode, so that they wait at most a given multiple of their own step.

Learned from the time of steps: a step of B sequences without prompt tokens takes d(B); prompt tokens add a part that does not
depend on their number n (the host launches kernel by kernel) and p for each. Both come from a line through the measured
(n, time beyond d(B)), older ones counting less, so a prompt whose tokens get dearer as its context grows is given fewer of
them at a time. With r times d(B) allowed, the time beyond d(B) is at most (r - 1) · d(B), but never cut below twice the fixed
part: smaller chunks would cost those who wait more in all than they spare them in each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import StepPlan, StepResult

WEIGHT = 0.2
"""Of a new measurement in a running mean."""
LEAST = 16
"""Tokens: a prompt gets on, whatever it costs others."""
SPREAD = 0.02
"""Chunks that differ by less than this share of their size, squared and on average, say nothing about the slope."""


class PrefillBudget:
    """`most` tokens where nobody decodes, or without a `ratio` (> 1). Torch-free; fed by the engine with collected steps."""

    def __init__(self, most: int, ratio: float | None) -> None:
        self.most = most
        self.ratio = ratio
        self._decode: dict[int, float] = {}
        """Bucket of sequences → seconds of a step without prompt tokens."""
        self._tokens = self._squares = self._seconds = self._products = 0.0
        """Running means of n, n², the seconds that n tokens added, and n · seconds."""
        self._known = False
        self._share = 1.0
        """Of those seconds, what the tokens themselves took, as the last chunks of different sizes told."""

    def tokens(self, decoding: int) -> int:
        """For a step in which `decoding` sequences decode."""
        step = self._decode.get(_bucket(decoding))
        if self.ratio is None or not decoding or step is None or not self._known:
            return self.most
        fixed, token = self._line()
        if token <= 0:
            return self.most
        allowed = max((self.ratio - 1) * step, 2 * fixed)
        return max(LEAST, min(self.most, int((allowed - fixed) / token)))

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        bucket = _bucket(len(plan.decode))
        if not plan.prefill:
            self._decode[bucket] = _mean(self._decode.get(bucket), result.seconds)
            return
        tokens = sum(chunk.count for chunk in plan.prefill)
        alone = self._decode.get(bucket) if plan.decode else 0.0
        if alone is not None and tokens >= LEAST:
            self._add(tokens, max(0.0, result.seconds - alone))

    def _add(self, tokens: int, seconds: float) -> None:
        weight = WEIGHT if self._known else 1.0
        self._known = True
        self._tokens += weight * (tokens - self._tokens)
        self._squares += weight * (tokens * tokens - self._squares)
        self._seconds += weight * (seconds - self._seconds)
        self._products += weight * (tokens * seconds - self._products)
        variance = self._squares - self._tokens**2
        if variance > SPREAD * self._squares and self._seconds > 0:
            slope = (self._products - self._tokens * self._seconds) / variance
            self._share = min(1.0, max(0.0, slope * self._tokens / self._seconds))

    def _line(self) -> tuple[float, float]:
        """Seconds of the fixed part and of a token. Before chunks have differed, all is the tokens': the next chunk is smaller
        then, and tells the two apart."""
        return (1 - self._share) * self._seconds, self._share * self._seconds / self._tokens


def _mean(known: float | None, new: float) -> float:
    return new if known is None else known + WEIGHT * (new - known)


def _bucket(sequences: int) -> int:
    """The next power of two."""
    return 1 << max(0, sequences - 1).bit_length()
