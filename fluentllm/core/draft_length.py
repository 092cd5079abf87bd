"""How many drafts a step should verify: chosen from the measured time of each program and the running acceptance.

A step that verifies K drafts brings 1 + Σ_{j ≤ K} s_j tokens on average, where s_j is the share of sequences whose first j
drafts were all right; it takes a time t(B, K). The best K is the one with the most tokens a second. K = 0 is always among
them, so speculation that does not pay turns itself off; every now and then the longest K is tried again, at growing
intervals while it keeps losing.
"""

from __future__ import annotations

from typing import Literal

from .draft_watchdog import AcceptanceWatch
from .types import StepPlan, StepResult

WEIGHT = 0.1
"""Of a new measurement in a running mean."""
TRIALS = 3
"""Steps that measure a K before it is judged."""
FIRST_INTERVAL, LAST_INTERVAL = 32, 2048
"""Steps between two trials of what is not chosen."""


class DraftLength:
    """`k` fixed, or `auto` for 0 … `max_k`. Torch-free; fed by the engine with every collected step."""

    def __init__(self, k: int | Literal["auto"], max_k: int, watch: AcceptanceWatch | None = None) -> None:
        self.watch = watch or AcceptanceWatch(0.0)
        self.fixed = None if k == "auto" else k
        self.max_k = max_k if self.fixed is None else self.fixed
        self.survival = [0.0] * self.max_k
        """s_1 … s_K, running means."""
        self._weighed = [0] * self.max_k
        self._times: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._interval = FIRST_INTERVAL
        self._until_trial = FIRST_INTERVAL
        self._trial = 0
        self._last_best = 0
        self._stopped = False

    def stop(self) -> None:
        """The proposer is gone: draft no more."""
        self._stopped = True

    def choose(self, batch: int) -> int:
        """Drafts to ask for, for a step of about `batch` sequences."""
        if self._stopped or not self.watch.allows():
            return 0
        if self.fixed is not None:
            return self.fixed
        bucket = _bucket(batch)
        unmeasured = [k for k in range(self.max_k + 1) if self._counts.get((bucket, k), 0) < TRIALS]
        if unmeasured:
            # The longest first: it teaches the acceptance at every position.
            return unmeasured[-1]
        if self._trial:
            self._trial -= 1
            return self.max_k
        best = max(range(self.max_k + 1), key=lambda k: self.tokens_a_second(bucket, k))
        self._schedule_trial(best)
        return best

    def tokens_a_second(self, bucket: int, k: int) -> float:
        return (1 + sum(self.survival[:k])) / self._times[bucket, k]

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        k = plan.drafting.verify
        decoded = result.slots[len(result.slots) - len(plan.decode) :]
        live = [slot for slot in decoded if slot.tokens]
        if not live:
            return
        drafted = [slot for slot in live if slot.drafted]
        self.watch.saw(len(drafted), sum(slot.accepted > 0 for slot in drafted))
        for j in range(k):
            share = sum(slot.accepted > j for slot in live) / len(live)
            self._weighed[j] += 1
            weight = max(WEIGHT, 1 / self._weighed[j])
            self.survival[j] += weight * (share - self.survival[j])
        # A step costs what it verifies and what it drafts: only where both are k is it the time of k. On a GPU each pair is a
        # program of its own, and what a change of k runs for the first time must not count.
        if not plan.prefill and plan.drafting.draft == k:
            key = _bucket(len(plan.decode)), k
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if count == 1:
                # The first run of a program pays for its compilation and cold caches.
                self._times[key] = result.seconds
            else:
                weight = 1.0 if count == 2 else WEIGHT
                self._times[key] += weight * (result.seconds - self._times[key])

    def _schedule_trial(self, best: int) -> None:
        """Count down to the next trial of the longest K; wait longer each time that it changed nothing."""
        if best == self.max_k:
            self._until_trial = self._interval = FIRST_INTERVAL
            return
        self._until_trial -= 1
        if self._until_trial <= 0:
            self._interval = FIRST_INTERVAL if best != self._last_best else min(2 * self._interval, LAST_INTERVAL)
            self._until_trial, self._trial, self._last_best = self._interval, TRIALS, best


def _bucket(batch: int) -> int:
    """The next power of two: batches of like size share their times."""
    return 1 << max(0, batch - 1).bit_length()
