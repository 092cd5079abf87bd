"""How many drafts a step should verify: chosen from the measured time of each program and the running acceptance.

A step that verifies K drafts brings 1 + Σ_{j ≤ K} s_j tokens on average, where s_j is the share of sequences whose first j
drafts were all right; it takes a time t(B, K). The best K is the one with the most tokens a second. K = 0 is always among
them, so speculation that does not pay turns itself off.

What is not known yet is measured where it could be the best: a program's time a few times when its batch first comes up, and
again what was not chosen for long. The latter may cost `TRIAL_SHARE` of the time and no more.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from .buckets import bucket_of
from .draft_costs import TRIALS, StepTimes, Survival, class_of
from .draft_watchdog import AcceptanceWatch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .types import SlotResult, StepPlan, StepResult

TRIAL_SHARE = 0.01
"""Of all time: what trying again may lose."""
TRIAL_SEQUENCES = 8
"""Sequences' steps of a trial, and what it leaves of older knowledge of the same drafts."""
PATIENCE = 4 * TRIALS
"""Steps that ask for a program's time: where each has a prompt with it, none tells."""
MARGIN = 1.01
"""By how much another K must be better: a change costs a step of its own."""
HOPE = 1.5
"""A K whose last known rate is worse than the best by more is not tried again."""


class DraftLength:
    """`k` fixed, or `auto` for 0 … `max_k`. Fed by the engine with every step that it launches and collects."""

    def __init__(self, k: int | Literal["auto"], max_k: int, watch: AcceptanceWatch | None = None) -> None:
        self.watch = watch or AcceptanceWatch(0.0)
        self.fixed = None if k == "auto" else k
        self.max_k = max_k if self.fixed is None else self.fixed
        self.times = StepTimes()
        self.survival = Survival(self.max_k)
        self._classes: dict[int, Hashable] = {}
        """Slot → the class of the request in it."""
        self._mix: Counter[Hashable] = Counter()
        """Of the last launched step."""
        self._asked: Counter[tuple[int, int]] = Counter()
        self._best: dict[int, int] = {}
        self._trial: tuple[int, int] | None = None
        """K that is tried again, and for how many more steps."""
        self._tried_longest = False
        self._tried: dict[tuple[int, int], int] = {}
        self._steps = 0
        self._spent = 0.0
        self._lost = 0.0
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
        bucket = bucket_of(batch)
        unknown = self._unknown(bucket)
        if unknown is not None:
            return unknown
        best = self._best_of(bucket)
        if self._trial is None:
            self._trial = self._next_trial(bucket, best)
        return self._trial[0] if self._trial is not None else best

    def planned(self, plan: StepPlan) -> None:
        """The engine launches it."""
        if self.fixed is not None:
            return
        for init in plan.admit:
            self._classes[init.slot] = class_of(init.params)
        named = [*plan.decode, *(chunk.slot for chunk in plan.prefill if chunk.last)]
        self._mix = Counter(self._classes.get(slot) for slot in named)
        self._steps += 1
        k = plan.drafting.draft
        self._asked[bucket_of(len(named)), k] += 1
        if self._trial is not None and self._trial[0] == k:
            self._trial = (k, self._trial[1] - 1) if self._trial[1] > 1 else None

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        k = plan.drafting.verify
        decoded = result.slots[len(result.slots) - len(plan.decode) :]
        live = [slot for slot in decoded if slot.tokens]
        if not live:
            return
        drafted = [slot for slot in live if slot.drafted]
        self.watch.saw(len(drafted), sum(slot.accepted > 0 for slot in drafted))
        if self.fixed is not None:
            return
        if k:
            self._learn(live, k)
        bucket = bucket_of(len(plan.decode))
        # A step costs what it verifies and what it drafts: only where both are k is it the time of k. On a GPU each pair is a
        # program of its own, and what a change of k runs for the first time must not count.
        if not plan.prefill and plan.drafting.draft == k:
            self.times.add(bucket, k, result.seconds)
        self._account(bucket, k, sum(len(slot.tokens) for slot in live) / len(live))

    # -------------------------------------------------------------------------------------------------------------- choice
    def _unknown(self, bucket: int) -> int | None:
        """A K whose time must be measured before there is a choice: at first the longest, which teaches the acceptance of
        every draft, or what was best elsewhere; then 0; then what could be the best if its time is as short as it can be."""
        known = [k for k in range(self.max_k + 1) if self.times.known(bucket, k) is not None]
        guess = next(reversed(self._best.values()), self.max_k)
        if not known and self._asked[bucket, guess] < PATIENCE:
            return guess
        if 0 not in known:
            return 0
        rate = max(self._rate(bucket, k) for k in known)
        missing = [k for k in range(self.max_k + 1) if k not in known and self._asked[bucket, k] < PATIENCE]
        hopes = {k: self._tokens(k) / self.times.least(bucket, k) for k in missing}
        hopeful = max(hopes, key=hopes.__getitem__, default=None)
        return hopeful if hopeful is not None and hopes[hopeful] > MARGIN * rate else None

    def _best_of(self, bucket: int) -> int:
        known = [k for k in range(self.max_k + 1) if self.times.known(bucket, k) is not None]
        best = max(known, key=lambda k: self._rate(bucket, k))
        held = self._best.pop(bucket, best)
        if self._rate(bucket, best) < MARGIN * self._rate(bucket, held):
            best = held
        self._best[bucket] = best  # the last of the dictionary
        return best

    def _next_trial(self, bucket: int, best: int) -> tuple[int, int] | None:
        """The longest K, for the acceptance of all drafts, and in turn whichever other was tried longest ago."""
        rate = self._rate(bucket, best)
        others = [
            k
            for k in range(self.max_k + 1)
            if k != best and self.times.known(bucket, k) is not None and HOPE * self._rate(bucket, k) > rate
        ]
        k = min(others, key=lambda k: self._tried.get((bucket, k), 0), default=self.max_k)
        if best < self.max_k and not self._tried_longest:
            k = self.max_k
        if k == best:
            return None
        sequences = max(1, self._mix.total())
        steps = max(2, -(-TRIAL_SEQUENCES // sequences)) + 1
        seconds = self.times.known(bucket, k) or self.times.least(bucket, k)
        if self._lost + steps * max(0.0, seconds - 1 / rate) > TRIAL_SHARE * self._spent:
            return None
        self._tried_longest = k == self.max_k
        self._tried[bucket, k] = self._steps
        if k > best:
            self.survival.forget(best, TRIAL_SEQUENCES)
        return k, steps

    def _rate(self, bucket: int, k: int) -> float:
        """Tokens a second of a sequence. The time must be known."""
        seconds = self.times.known(bucket, k)
        assert seconds is not None
        return self._tokens(k) / seconds

    def _tokens(self, k: int) -> float:
        return self.survival.tokens(self._mix, k)

    # ------------------------------------------------------------------------------------------------------------ learning
    def _learn(self, live: list[SlotResult], k: int) -> None:
        accepted: dict[Hashable, list[int]] = {}
        for slot in live:
            accepted.setdefault(self._classes.get(slot.slot), []).append(slot.accepted)
        for kind, counts in accepted.items():
            self.survival.add(kind, counts, k)

    def _account(self, bucket: int, k: int, tokens: float) -> None:
        """How much of the time was lost by steps that were not the best known."""
        best, seconds = self._best.get(bucket), self.times.known(bucket, k)
        if best is None or seconds is None:
            return
        self._spent += seconds
        if k != best:
            self._lost = max(0.0, self._lost + seconds - tokens / self._rate(bucket, best))
