"""How many drafts a step should verify: chosen from the measured time of each program and the running acceptance.

A step that verifies K drafts brings 1 + Σ_{j ≤ K} s_j tokens on average, where s_j is the share of sequences whose first j
drafts were all right; it takes a time t(B, K). The best K is the one with the most tokens a second. K = 0 is always among
them, so speculation that does not pay turns itself off.

It begins at K = 0, and what else it must know it finds out as cheaply as that can be had:

* *acceptance* by looking: a step leaves one draft more than it verifies, and that one is only compared with the token that
  comes in its place. This takes the time of making a draft; nothing is verified in vain. On a GPU, where it takes a program of
  its own, only while nothing is verified.
* *times* by trying a K that could be the best if its time is as short as it can be. A bucket that was not seen begins with what
  is best at the nearest.

Both are paid from an allowance, a share of all time, before they are done. So what is learnt costs at most that share, however
wrong the drafts are, and where drafts are right it costs nothing: then trying is no loss.

On a GPU the first runs of a program stall: it compiles and is captured. So there are few of them: a step verifies as many
drafts as it leaves, whatever the one before it left. And one that is new to a bucket must promise to make good for its stall,
if it runs for as long as the bucket has run so far: nobody knows how long that will be, and as long as before is a fair guess.
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
FIRST_LOOKS, FIRST_TRIALS = 1.0, 2.0
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
HELD = 7
"""Steps that a choice of no drafts and no look holds where nothing changes but time: to choose takes as long as 2 % of a small
model's step on a CPU."""
DROPPED_EAGER, DROPPED_CAPTURED = 1, 2
"""First runs of a program that tell nothing: on a GPU one compiles and the next is captured."""


class Choice(NamedTuple):
    """What a step does: it verifies `k` drafts and leaves as many, and with `look` one more, to see whether it is right."""

    k: int
    look: bool = False

    @property
    def drafts(self) -> int:
        return self.k + self.look


class Trial(NamedTuple):
    """Steps of one K, for its time's sake."""

    bucket: int
    k: int
    left: int
    """How many more at most."""
    unknown: bool
    """It ends as soon as the time is known."""


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
        self._decoding: set[int] = set()
        """Slots that the next step may decode, as far as is known: a step over prompts alone leaves the others waiting."""
        self._mix: Counter[Hashable] = Counter()
        """Of these."""
        self._rates: dict[tuple[int, int], float] = {}
        """By (bucket, K), since anything changed: on a CPU what the host computes is taken from the model."""
        self._best: dict[int, int] = {}
        self._trial: Trial | None = None
        self._bucket = 0
        """Of the last launched step that decodes."""
        self._held = (0, 0)
        """Bucket, and how many of its steps still need no choice: no drafts."""
        self._same: list[int] | None = None
        """Slots of the last launched step, if another like it is quiet: nothing drafted, looked at, tried, or new."""
        self._quiet: set[int] = set()
        """Steps in flight that are."""
        self._unread: list[tuple[int, float]] = []
        """Buckets and seconds of quiet steps, learnt from when there is something to choose: in each step it would take ten
        times as long, for a model's pass in between leaves nothing of it in a core's caches."""
        self._left: set[int] = set()
        """Slots that were left drafts by the last step that brought them tokens."""
        self._verifiable: dict[int, set[int]] = {}
        """Step in flight → slots whose drafts it verifies."""
        self._left_by_trial = False
        """What the last launched step left for the next to verify."""
        self._trials: set[int] = set()
        """Steps in flight that belong to a trial."""
        self._tried: dict[tuple[int, int], int] = {}
        """(bucket, K) → steps of the bucket at its last trial."""
        self._steps: Counter[int] = Counter()
        """Launched, of each bucket."""
        self.stopped = False

    def stop(self) -> None:
        """The proposer is gone: draft no more."""
        self.stopped = True

    def choose(self, batch: int) -> Choice:
        """What a step of about `batch` sequences should do."""
        if self.stopped or not self.watch.allows():
            return Choice(0)
        if self.fixed is not None:
            return Choice(self.fixed)
        if not batch:
            self._decoding = set()
        if not self.times.measured:
            self._read_quiet()
            return Choice(0)
        bucket = bucket_of(batch)
        held, left = self._held
        if left and held == bucket:
            self._held = bucket, left - 1
            return Choice(0)
        self._read_quiet()
        best = self._best_of(bucket)
        trial = self._trial
        if trial is None or trial.bucket != bucket or (trial.unknown and self.times.known(bucket, trial.k, trial.k)):
            self._trial = self._next_trial(bucket, best)
        if self._trial is not None:
            return Choice(self._trial.k)
        look = self._may_look(bucket, best)
        # Where only its turn is missing, the next step looks.
        self._held = bucket, 0 if best or look or self._steps[bucket] % LOOKS == 0 else HELD
        return Choice(best, look=look)

    def planned(self, plan: StepPlan) -> None:
        """The engine launches it."""
        if self.fixed is not None:
            return
        if self._trial is None and plan.decode == self._same and _plain(plan):
            self._steps[self._bucket] += 1
            self._quiet.add(plan.step)
            return
        for init in plan.admit:
            self._classes[init.slot] = class_of(init.params)
            self._decoding.discard(init.slot)
        named = [*plan.decode, *(chunk.slot for chunk in plan.prefill if chunk.last)]
        self._decoding = set(named) if plan.decode else self._decoding.union(named)
        mix = Counter(self._classes.get(slot) for slot in self._decoding)
        if plan.admit or mix != self._mix:
            self._held = 0, 0
        self._mix = mix
        self._rates = {}
        for kind, new in Counter(self._classes[init.slot] for init in plan.admit).items():
            self.acceptance.renew(kind, new, self._mix[kind])
        if plan.decode:
            self._left.update(chunk.slot for chunk in plan.resume)
            self._verifiable[plan.step] = self._left.intersection(plan.decode) if plan.drafting.verify else set()
            self._decodes(plan)
        self._left.difference_update(named)
        if plan.drafting.draft:
            self._left.update(named)
        quiet = _plain(plan) and self._trial is None and not self._left_by_trial
        self._same = plan.decode if quiet else None

    def _decodes(self, plan: StepPlan) -> None:
        """A step over prompts alone is none of its bucket, and none of a trial."""
        self._bucket = bucket_of(len(plan.decode))
        self._steps[self._bucket] += 1
        trial = self._trial
        if self._left_by_trial or trial is not None:
            self._trials.add(plan.step)
        self._left_by_trial = trial is not None
        if trial is not None:
            self._trial = trial._replace(left=trial.left - 1) if trial.left > 1 else None

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step."""
        if plan.step in self._quiet:
            self._quiet.discard(plan.step)
            if all(slot.tokens and slot.finished is None for slot in result.slots):
                self._unread.append((bucket_of(len(plan.decode)), result.seconds))
                return
        decoded = result.slots[len(result.slots) - len(plan.decode) :]
        live = [slot for slot in decoded if slot.tokens]
        drafted = [slot for slot in live if slot.drafted]
        self.watch.saw(len(drafted), sum(slot.accepted > 0 for slot in drafted))
        if self.fixed is not None:
            return
        self._read_quiet()
        self._rates = {}
        self._decoding.difference_update(slot.slot for slot in result.slots if slot.finished is not None)
        verifiable, of_trial = self._verifiable.pop(plan.step, set()), plan.step in self._trials
        self._trials.discard(plan.step)
        if live:
            self._learn(live, verifiable)
            self._account(plan, result, sum(len(slot.tokens) for slot in live) / len(live), of_trial)
        self._looks.expect(plan, result)

    def _read_quiet(self) -> None:
        for bucket, seconds in self._unread:
            self.times.add(bucket, 0, 0, seconds)
            if self.times.measured:
                self._earn(bucket, self.times.leaving(bucket, 0, 0))
        if self._unread:
            self._unread, self._rates = [], {}

    # -------------------------------------------------------------------------------------------------------------- choice
    def _best_of(self, bucket: int) -> int:
        """Of all K that were measured in any bucket; one whose program has not run in this one must be worth its stall."""
        rates = {k: self._rate(bucket, k) for k in self.times.measured}
        running = [k for k in rates if self.times.runs(bucket, k, k)] or list(rates)
        best = max(running, key=rates.__getitem__)
        held = self._best.get(bucket)
        if held in running and rates[best] < MARGIN * rates[held]:
            best = held
        other = max(rates, key=rates.__getitem__)
        if rates[other] >= MARGIN * rates[best] and self._worth(bucket, other, rates[other] / rates[best]):
            best = other
        self._best[bucket] = best
        return best

    def _worth(self, bucket: int, k: int, gain: float, price: float = 0.0) -> bool:
        """Whether a K that may be so many times as good as the best, had it run as long as the bucket has, makes good for its
        price and for the first runs of a program. The first time that a K is measured anywhere it does."""
        if k not in self.times.measured:
            return True
        if not self.times.runs(bucket, k, k):
            price += self.times.stall
        return (gain - 1) * self.times.spent(bucket) >= price

    def _may_look(self, bucket: int, best: int) -> bool:
        if best == self.max_k or self._steps[bucket] % LOOKS == 0 or best not in self.times.lengths(bucket):
            return False
        if not self._eager and (best or (self.times.spent(bucket) < self.times.stall and not self.times.runs(bucket, 0, 1))):
            return False
        # While something is verified acceptance is known well, and what is saved is for times when nothing is.
        return self._for_looks.covers(self._price_of_look(bucket, best) * (LOOKS_SAVED if best else 1))

    def _next_trial(self, bucket: int, best: int) -> Trial | None:
        """Of what could be the best if its time is as short as it can be, the most hopeful that can be afforded; where there is
        no such, in turn, what has rested longest, and long enough. What is saved for the one is not spent on the other."""
        known = self.times.lengths(bucket)
        if bucket != self._bucket or best not in known:
            return None
        rate = self._rate(bucket, best)
        hopes: dict[Trial, float] = {}
        for k in range(self.max_k + 1):
            if k not in known:
                hope = self.acceptance.tokens(self._mix, k) / self._mean(bucket, k, self.times.shortest(bucket, k))
                trial = Trial(bucket, k, self._steps_to_know(bucket, k), unknown=True)
                if hope > MARGIN * rate and self._worth(bucket, k, hope / rate, self._price(trial, best, rate)):
                    hopes[trial] = hope
        if hopes:
            # Without drafts nothing can be lost beside what no drafts take: this needs no allowance.
            trials = [trial for trial in hopes if not trial.k or self._for_trials.covers(self._price(trial, best, rate))]
            chosen = max(trials, key=hopes.__getitem__, default=None)
        else:
            chosen = self._again(bucket, best, rate)
        if chosen is not None:
            self._tried[bucket, chosen.k] = self._steps[bucket]
        return chosen

    def _again(self, bucket: int, best: int, rate: float) -> Trial | None:
        """Of a K that is known: the machine may have changed, or the requests."""
        rested = {k: self._steps[bucket] - self._tried.get((bucket, k), 0) for k in self.times.lengths(bucket) if k != best}
        due = {k: steps for k, steps in rested.items() if steps >= (REST if HOPE * self._rate(bucket, k) > rate else LONG_REST)}
        if not due:
            return None
        trial = Trial(bucket, max(due, key=due.__getitem__), AGAIN, unknown=False)
        return trial if self._for_trials.covers(self._price(trial, best, rate)) else None

    def _steps_to_know(self, bucket: int, k: int) -> int:
        """The first step has no drafts to verify, and others where none is offered neither: they do not tell. A captured
        program's first is dropped anyway."""
        dropped, others = self.times.runs_missing(bucket, k)
        if not k:
            return max(1, dropped + others)
        offered = max(self.acceptance.offered(self._mix), 0.25)
        return 1 + ceil((dropped + others) / offered) if self._eager else max(1, dropped) + ceil(others / offered)

    def _price(self, trial: Trial, best: int, rate: float) -> float:
        """Seconds that are lost by it, as far as is known."""
        bucket, k, steps, _ = trial
        tokens, of_best = self.acceptance.tokens(self._mix, k), self.acceptance.tokens(self._mix, best)
        lost = self._mean(bucket, k, self.times.expected(bucket, k)) - tokens / rate
        if self._eager and k > best:
            return steps * max(0.0, lost) + self.times.drafting(bucket, k)
        # At one end of it a step verifies more drafts than it was left, at the other fewer.
        return max(0.0, steps * lost + abs(of_best - tokens) / rate)

    def _rate(self, bucket: int, k: int) -> float:
        """Tokens a second of a sequence, as far as is known. K must be measured somewhere."""
        rate = self._rates.get((bucket, k))
        if rate is None:
            seconds = self.times.expected(bucket, k)
            rate = self._rates[bucket, k] = self.acceptance.tokens(self._mix, k) / self._mean(bucket, k, seconds)
        return rate

    def _mean(self, bucket: int, k: int, seconds: float) -> float:
        """Of a step with K, which takes `seconds` where there is anything to verify."""
        if not k:
            return seconds
        nothing = self.times.leaving(bucket, 0, k) if self._eager else self.times.in_vain(bucket, k)
        offered = self.acceptance.offered(self._mix)
        return offered * seconds + (1 - offered) * min(seconds, nothing)

    def _price_of_look(self, bucket: int, k: int) -> float:
        return max(0.0, self.times.leaving(bucket, k, k + 1) - self.times.leaving(bucket, k, k))

    # ------------------------------------------------------------------------------------------------------------ learning
    def _learn(self, live: list[SlotResult], verifiable: set[int]) -> None:
        """What ends a request cuts its drafts short: that says nothing of them."""
        verified: dict[Hashable, list[tuple[int, int]]] = {}
        looked: dict[Hashable, list[tuple[int, int]]] = {}
        for slot in live:
            if slot.finished is not None:
                continue
            kind = self._classes.get(slot.slot)
            if slot.slot in verifiable:
                verified.setdefault(kind, []).append((slot.drafted, slot.accepted))
            seen = self._looks.see(slot)
            if seen is not None:
                looked.setdefault(kind, []).append(seen)
        if verified or looked:
            self._held = 0, 0
        for kind, rights in verified.items():
            self.acceptance.add(kind, rights)
        for kind, rights in looked.items():
            self.acceptance.add(kind, rights, self._looks.place)
        if not self._looks.place:
            first = [right for rights in looked.values() for drafts, right in rights if drafts]
            self.watch.saw(len(first), sum(first))

    def _account(self, plan: StepPlan, result: StepResult, tokens: float, of_trial: bool) -> None:
        """The step's time, and what it earned or spent."""
        bucket, drafting = bucket_of(len(plan.decode)), plan.drafting
        in_vain = result.verified > 0 and not any(slot.drafted for slot in result.slots)
        self.times.add(bucket, result.verified, drafting.draft, None if plan.prefill else result.seconds, in_vain=in_vain)
        if not self.times.measured:
            return
        seconds = self.times.leaving(bucket, result.verified, drafting.draft)
        if not plan.prefill and self.times.known(bucket, result.verified, drafting.draft) is None:
            seconds = min(seconds, result.seconds)
        self._earn(bucket, seconds)
        if drafting.look:
            self._for_looks.spend(self._price_of_look(bucket, drafting.draft - 1))
        if of_trial:
            self._for_trials.spend(seconds - tokens / self._rate(bucket, self._best.get(bucket, 0)))

    def _earn(self, bucket: int, seconds: float) -> None:
        for allowance in (self._for_looks, self._for_trials):
            allowance.earn(seconds, self.times.expected(bucket, 0))


def _plain(plan: StepPlan) -> bool:
    """Does the step do nothing but decode, without a draft?"""
    return not (plan.admit or plan.prefill or plan.resume or plan.drafting.draft or plan.drafting.verify)
