"""How many prompt tokens a step may hold while others decode, so that they wait at most a given multiple of their own step.

Learned from the time of steps: a step of B sequences without prompt tokens takes d(B), and each prompt token adds p. With
r times d(B) allowed, (r - 1) · d(B) / p tokens fit. Both are running means, so a prompt whose tokens get dearer as its
context grows is given fewer of them at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import StepPlan, StepResult

WEIGHT = 0.2
"""Of a new measurement in a running mean."""
LEAST = 16
"""Tokens: a prompt gets on, whatever it costs others."""


class PrefillBudget:
    """`most` tokens where nobody decodes, or without a `ratio` (> 1). Torch-free; fed by the engine with collected steps."""

    def __init__(self, most: int, ratio: float | None) -> None:
        self.most = most
        self.ratio = ratio
        self._decode: dict[int, float] = {}
        """Bucket of sequences → seconds of a step without prompt tokens."""
        self._token: float | None = None
        """Seconds that a prompt token adds."""

    def tokens(self, decoding: int) -> int:
        """For a step in which `decoding` sequences decode."""
        step = self._decode.get(_bucket(decoding))
        if self.ratio is None or not decoding or step is None or self._token is None:
            return self.most
        if self._token <= 0:
            return self.most
        return max(LEAST, min(self.most, int((self.ratio - 1) * step / self._token)))

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        bucket = _bucket(len(plan.decode))
        if not plan.prefill:
            self._decode[bucket] = _mean(self._decode.get(bucket), result.seconds)
            return
        tokens = sum(chunk.count for chunk in plan.prefill)
        alone = self._decode.get(bucket) if plan.decode else 0.0
        if alone is not None and tokens >= LEAST:
            self._token = _mean(self._token, max(0.0, result.seconds - alone) / tokens)


def _mean(known: float | None, new: float) -> float:
    return new if known is None else known + WEIGHT * (new - known)


def _bucket(sequences: int) -> int:
    """The next power of two."""
    return 1 << max(0, sequences - 1).bit_length()
