"""How many drafts a step should verify: chosen from the measured time of each program and the running acceptance.

A step that verifies K drafts brings 1 + Σ_{j ≤ K} s_j tokens on average, where s_j is the share of sequences whose first j
drafts were all right; it takes a time t(B, K). The best K is the one with the most tokens a second. K = 0 is always among
them, so speculation that does not pay turns itself off.

It begins at K = 0, and what else it must know it finds out as cheaply as that can be had:

* *acceptance* by looking: a step leaves one draft more than the next will verify, and that one is only compared with the token
  that comes in its place. This takes the time of making a draft; nothing is verified in vain.
* *times* by trying a K that could be the best if its time is as short as it can be.

Both are paid from an allowance, a share of all time, before they are done. So what is learnt costs at most that share, however
wrong the drafts are, and where drafts are right it costs nothing: then trying is no loss.
"""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import TYPE_CHECKING, Literal, NamedTuple

from .buckets import bucket_of
from .draft_acceptance import Acceptance, class_of
from .draft_costs import Allowance, StepTimes
from .draft_looks import Looks
from .draft_watchdog import AcceptanceWatch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .types import SlotResult, StepPlan, StepResult

LOOK_SHARE, TRIAL_SHARE = 0.005, 0.005
"""Of all time: what looking and trying may cost."""
FIRST_LOOKS, FIRST_TRIALS = 1.0, 1.0
"""Plain steps' time that the allowances for them begin with."""
LOOKS = 8
"""Of as many steps one is without a look: the time of the best K itself must stay known."""
LOOKS_SAVED = 4
"""Looks that are kept back while drafts are verified."""
AGAIN, REST = 3, 64
"""Steps of a trial of a K whose time is known, and from one trial of it to the next."""
MARGIN = 1.01
"""By how much another K must be better: a change costs a step of its own."""
HOPE, LONG_REST = 1.5, 4096
"""A K whose last known rate is worse than the best by more rests so many steps: most likely it would be tried in vain, but what
made it slow may have been another program."""
DROPPED_EAGER, DROPPED_CAPTURED = 1, 2
"""First runs of a program that tell nothing: on a GPU one compiles and the next is captured."""


class Choice(NamedTuple):
    """What a step leaves: `k` drafts for the next to verify, and with `look` one more, only to see whether it is right."""

    k: int
    look: bool = False

    @property
    def drafts(self) -> int:
        return self.k + self.look


class DraftLength:
    """`k` fixed, or `auto` for 0 … `max_k`. Fed by the engine with every step that it launches and collects."""

    def __init__(
        self,
        k: int | Literal["auto"],
        max_k: int,
        watch: AcceptanceWatch | None = None,
        *,
        eager: bool = False,
        synthetic: float | None = None,
    ) -> None:
        """`eager`: programs are not captured, and verify nothing where no sequence has a draft; `synthetic`: share of drafts
        that are accepted whatever they are."""
        self.watch = watch or AcceptanceWatch(0.0)
        self.fixed = None if k == "auto" else k
        self.max_k = max_k if self.fixed is None else self.fixed
        self.times = StepTimes(DROPPED_EAGER if eager else DROPPED_CAPTURED)
        self.acceptance = Acceptance()
        self._eager = eager
        self._looks = Looks(synthetic)
        self._for_looks = Allowance(LOOK_SHARE, FIRST_LOOKS)
        self._for_trials = Allowance(TRIAL_SHARE, FIRST_TRIALS)
        self._classes: dict[int, Hashable] = {}
        """Slot → the class of the request in it."""
        self._mix: Counter[Hashable] = Counter()
        """Of the last launched step."""
        self._rates: dict[tuple[int, int], float] = {}
        """By (bucket, K), since anything changed: on a CPU what the host computes is taken from the model."""
        self._best: dict[int, int] = {}
        self._trial: tuple[int, int, bool] | None = None
        """K that is tried, for how many more steps at most, and whether only until its time is known."""
        self._left_by_trial = False
        """What the last launched step left for the next to verify."""
        self._trials: set[int] = set()
        """Steps in flight that belong to a trial."""
        self._tried: dict[tuple[int, int], int] = {}
        self._steps = 0
        self._stopped = False

    def stop(self) -> None:
        """The proposer is gone: draft no more."""
        self._stopped = True

    def choose(self, batch: int) -> Choice:
        """What a step of about `batch` sequences should leave."""
        if self._stopped or not self.watch.allows():
            return Choice(0)
        if self.fixed is not None:
            return Choice(self.fixed)
        bucket = bucket_of(batch)
        if self.times.known(bucket, 0, 0) is None:
            return Choice(0)
        best = self._best_of(bucket)
        if self._trial is None or (self._trial[2] and self.times.known(bucket, self._trial[0], self._trial[0])):
            self._trial = self._next_trial(bucket, best)
        if self._trial is not None:
            return Choice(self._trial[0])
        return Choice(best, look=self._may_look(bucket, best))

    def planned(self, plan: StepPlan) -> None:
        """The engine launches it."""
        if self.fixed is not None:
            return
        for init in plan.admit:
            self._classes[init.slot] = class_of(init.params)
        named = [*plan.decode, *(chunk.slot for chunk in plan.prefill if chunk.last)]
        self._mix = Counter(self._classes.get(slot) for slot in named)
        self._rates = {}
        for kind, new in Counter(self._classes[init.slot] for init in plan.admit).items():
            self.acceptance.renew(kind, new, self._mix[kind])
        self._steps += 1
        if self._left_by_trial or self._trial is not None:
            self._trials.add(plan.step)
        self._left_by_trial = self._trial is not None
        if self._trial is not None:
            k, left, unknown = self._trial
            self._trial = (k, left - 1, unknown) if left > 1 else None

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        decoded = result.slots[len(result.slots) - len(plan.decode) :]
        live = [slot for slot in decoded if slot.tokens]
        drafted = [slot for slot in live if slot.drafted]
        self.watch.saw(len(drafted), sum(slot.accepted > 0 for slot in drafted))
        if self.fixed is not None:
            return
        self._rates = {}
        if live:
            self._learn(plan, live)
            self._account(plan, result, sum(len(slot.tokens) for slot in live) / len(live))
        self._looks.expect(plan, result)

    # -------------------------------------------------------------------------------------------------------------- choice
    def _best_of(self, bucket: int) -> int:
        best = max(self.times.lengths(bucket), key=lambda k: self._rate(bucket, k))
        held = self._best.get(bucket, best)
        if self._rate(bucket, best) < MARGIN * self._rate(bucket, held):
            best = held
        self._best[bucket] = best
        return best

    def _may_look(self, bucket: int, best: int) -> bool:
        if best == self.max_k or self._steps % LOOKS == 0:
            return False
        # While something is verified acceptance is known well, and what is saved is for times when nothing is.
        return self._for_looks.covers(self._price_of_look(bucket, best) * (LOOKS_SAVED if best else 1))

    def _next_trial(self, bucket: int, best: int) -> tuple[int, int, bool] | None:
        """Of what could be the best if its time is as short as it can be, the most hopeful; then, in turn, what has rested
        longest, and long enough."""
        rate, known = self._rate(bucket, best), set(self.times.lengths(bucket))
        hopes = {
            k: self.acceptance.tokens(self._mix, k) / self._mean(bucket, k, self.times.shortest(bucket, k))
            for k in range(1, self.max_k + 1)
            if k not in known
        }
        hopes = {k: hope for k, hope in hopes.items() if hope > MARGIN * rate}
        if hopes:
            # The first leaves drafts; where some have none to verify, it takes more.
            offered = self.acceptance.offered(self._mix) if self._eager else 1.0
            steps = 1 + ceil(self.times.runs_needed / max(offered, 0.25))
            affordable = [k for k in hopes if self._affordable(bucket, k, steps, rate)]
            if not affordable:
                return None
            k = max(affordable, key=hopes.__getitem__)
            self._tried[bucket, k] = self._steps
            return k, steps, True
        rested = {k: self._steps - self._tried.get((bucket, k), 0) for k in known if k != best}
        due = {k: steps for k, steps in rested.items() if steps >= (REST if HOPE * self._rate(bucket, k) > rate else LONG_REST)}
        if not due:
            return None
        k = max(due, key=due.__getitem__)
        if not self._affordable(bucket, k, AGAIN, rate):
            return None
        self._tried[bucket, k] = self._steps
        return k, AGAIN, False

    def _affordable(self, bucket: int, k: int, steps: int, rate: float) -> bool:
        seconds = self.times.known(bucket, k, k) or self.times.likely(bucket, k)
        loss = self._mean(bucket, k, seconds) - self.acceptance.tokens(self._mix, k) / rate
        price = steps * max(0.0, loss) + self.times.drafting(bucket, k)
        return self._for_trials.covers(price)

    def _rate(self, bucket: int, k: int) -> float:
        """Tokens a second of a sequence. The time must be known."""
        rate = self._rates.get((bucket, k))
        if rate is None:
            seconds = self.times.known(bucket, k, k)
            assert seconds is not None
            rate = self._rates[bucket, k] = self.acceptance.tokens(self._mix, k) / self._mean(bucket, k, seconds)
        return rate

    def _mean(self, bucket: int, k: int, seconds: float) -> float:
        """Of a step with K, which takes `seconds` where there is anything to verify."""
        if not k or not self._eager:
            return seconds
        offered = self.acceptance.offered(self._mix)
        return offered * seconds + (1 - offered) * min(seconds, self.times.leaving(bucket, 0, k))

    def _price_of_look(self, bucket: int, k: int) -> float:
        return max(0.0, self.times.leaving(bucket, k, k + 1) - self.times.leaving(bucket, k, k))

    # ------------------------------------------------------------------------------------------------------------ learning
    def _learn(self, plan: StepPlan, live: list[SlotResult]) -> None:
        """What ends a request cuts its drafts short: that says nothing of them."""
        verified: dict[Hashable, list[tuple[int, int]]] = {}
        looked: dict[Hashable, list[tuple[int, int]]] = {}
        for slot in live:
            if slot.finished is not None:
                continue
            kind = self._classes.get(slot.slot)
            if plan.drafting.verify:
                verified.setdefault(kind, []).append((slot.drafted, slot.accepted))
            seen = self._looks.see(slot)
            if seen is not None:
                looked.setdefault(kind, []).append(seen)
        for kind, rights in verified.items():
            self.acceptance.add(kind, rights)
        for kind, rights in looked.items():
            self.acceptance.add(kind, rights, self._looks.place)

    def _account(self, plan: StepPlan, result: StepResult, tokens: float) -> None:
        """The step's time, and what it earned or spent."""
        bucket, drafting = bucket_of(len(plan.decode)), plan.drafting
        if not plan.prefill:
            self.times.add(bucket, result.verified, drafting.draft, result.seconds)
        of_trial = plan.step in self._trials
        self._trials.discard(plan.step)
        plain = self.times.known(bucket, 0, 0)
        if plain is None:
            return
        seconds = self.times.leaving(bucket, result.verified, drafting.draft)
        if not plan.prefill and self.times.known(bucket, result.verified, drafting.draft) is None:
            seconds = min(seconds, result.seconds)
        for allowance in (self._for_looks, self._for_trials):
            allowance.earn(seconds, plain)
        if drafting.look:
            self._for_looks.spend(self._price_of_look(bucket, drafting.draft - 1))
        if of_trial:
            self._for_trials.spend(seconds - tokens / self._rate(bucket, self._best.get(bucket, 0)))
