"""The choice of K from times and acceptance that are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from fluentllm.core.buckets import bucket_of
from fluentllm.core.draft_length import DraftLength
from fluentllm.core.types import Drafting, PrefillChunk, SamplingParams, SlotInit, SlotResult, StepPlan, StepResult

RESULTS = [[SlotResult(0, 1, [0] * (a + 1), None, drafted=k, accepted=a) for a in range(k + 1)] for k in range(8)]


def simulate(lengths: DraftLength, seconds: Callable[[int, int], float], right: int, steps: int, batch: int = 4) -> list[int]:
    """Steps of `batch` sequences whose first `right` drafts are always right; a change of K costs a second → the Ks."""
    chosen, left = [], 0
    for step in range(steps):
        k = lengths.choose(batch)
        plan = StepPlan(step=step, decode=list(range(batch)), drafting=Drafting(left, k))
        lengths.planned(plan)
        slots = [RESULTS[left][min(left, right)]] * batch
        lengths.collected(plan, StepResult(step=step, slots=slots, seconds=seconds(left, k) + (left != k)))
        chosen.append(k)
        left = k
    return chosen


def test_it_finds_the_k_with_the_most_tokens_a_second() -> None:
    def seconds(verify: int, draft: int) -> float:
        return 0.010 + 0.001 * verify + 0.001 * draft

    for right, best in ((0, 0), (1, 1), (2, 2), (4, 4)):
        chosen = simulate(DraftLength("auto", 4), seconds, right, 120)
        assert chosen[60:90].count(best) >= 27, (right, chosen)


def test_drafts_that_cost_more_than_they_bring_are_left() -> None:
    chosen = simulate(DraftLength("auto", 3), lambda verify, draft: 0.010 * (1 + verify), 2, 2000)
    assert chosen[40:].count(0) > 0.98 * len(chosen[40:])
    assert 3 in chosen[100:], "it is tried again"


def test_steps_that_change_k_are_not_measured() -> None:
    lengths = DraftLength("auto", 2)
    simulate(lengths, lambda verify, draft: 0.01, 2, 100)
    known = [lengths.times.known(4, k) for k in range(3)]
    assert known[0] == known[2] == 0.01
    assert known[1] is None, "one draft cannot be better than two for the same price"


def test_a_fixed_k_stays() -> None:
    assert set(simulate(DraftLength(3, 5), lambda verify, draft: 1.0 + verify, 0, 50)) == {3}


def test_without_a_time_to_go_by_nothing_is_drafted() -> None:
    """Every step has a prompt with it: none tells what its decodes take."""
    lengths, left = DraftLength("auto", 3), 0
    for step in range(100):
        k = lengths.choose(2)
        plan = StepPlan(step=step, decode=[0, 1], prefill=[PrefillChunk(2, 0, 8, False)], drafting=Drafting(left, k))
        lengths.planned(plan)
        lengths.collected(plan, StepResult(step=step, slots=[RESULTS[left][0]] * 2, seconds=0.01))
        left = k
    assert left == 0


def test_classes_of_requests_are_told_apart() -> None:
    """Greedy requests accept all drafts, sampled ones none: K follows who runs."""
    lengths, chosen, left = DraftLength("auto", 3), [], 0
    for step in range(800):
        k = lengths.choose(4)
        sampled = step // 100 % 2
        admit = [
            SlotInit(i, step, [1], 1, 0, [], SamplingParams(max_tokens=9, temperature=float(sampled)), [])
            for i in range(4 * (step % 100 == 0))
        ]
        plan = StepPlan(step=step, admit=admit, decode=list(range(4)), drafting=Drafting(left, k))
        lengths.planned(plan)
        slots = [
            SlotResult(i, 1, [0] * (1 if sampled else left + 1), None, drafted=left, accepted=0 if sampled else left)
            for i in range(4)
        ]
        lengths.collected(plan, StepResult(step=step, slots=slots, seconds=0.01 + 0.004 * (left + k)))
        chosen.append(k)
        left = k
    for first in range(200, 800, 100):
        later = chosen[first + 20 : first + 100]
        assert later.count(0 if first // 100 % 2 else 3) > 0.9 * len(later), (first, later)


# ------------------------------------------------------------------------------------------------------------ in the long run
def memory_bound(batch: int, rows: int) -> float:
    """A few experts more for each row, then arithmetic."""
    return 3.0 + 9.0 * (1 - 0.97 ** (batch * rows)) + max(0.0, 0.02 * (batch * rows - 200))


def compute_bound(batch: int, rows: int) -> float:
    """A CPU: every row costs."""
    return 8.0 + 1.6 * batch * rows


def in_tiles(batch: int, rows: int) -> float:
    """Rows are computed in tiles of 64: one more may cost a lot, or nothing."""
    return 4.0 + 2.0 * -(-batch * rows // 64)


COSTS = [memory_bound, compute_bound, in_tiles]
MAX_K = 3


def long_run(cost: Callable[[int, int], float], batch: int, acceptance: float, k: int | None, steps: int) -> float:
    """Tokens a second of `steps` steps: a program's first two runs cost more, times are noisy, one in a hundred is interrupted.
    Of fixed K the expected figure. Drafting costs a tenth of a pass a draft."""

    def seconds(verify: int, draft: int) -> float:
        return cost(batch, verify + 1) + 0.1 * draft * cost(batch, 1)

    if k is not None:
        return sum(acceptance**j for j in range(k + 1)) / seconds(k, k)
    rng = random.Random(f"{cost.__name__} {batch} {acceptance}")
    lengths, left, runs = DraftLength("auto", MAX_K), 0, dict[tuple[int, int], int]()
    tokens = time = 0.0
    for step in range(steps):
        k = lengths.choose(batch)
        plan = StepPlan(step=step, decode=list(range(batch)), drafting=Drafting(left, k))
        lengths.planned(plan)
        # A large batch is drawn by its mean, with its noise: this is a test of the choice, not of random numbers.
        shares = [acceptance**j for j in range(left + 1)]
        if batch <= 16:
            slots = []
            for _ in range(batch):
                right = 0
                while right < left and rng.random() < acceptance:
                    right += 1
                slots.append(RESULTS[left][right])
        else:
            bounds = [round(batch * s + rng.gauss(0, (batch * s * (1 - s)) ** 0.5)) for s in shares]
            bounds = [max(0, min(batch, bound)) for bound in (batch, *bounds[1:], 0)]
            bounds = [min(bounds[: i + 1]) for i in range(len(bounds))]
            slots = [RESULTS[left][a] for a in range(left + 1) for _ in range(bounds[a] - bounds[a + 1])]
        true = seconds(left, k)
        run = runs[left, k] = runs.get((left, k), 0) + 1
        measured = true * rng.gauss(1, 0.02) * (5 if run <= 2 else 8 if rng.random() < 0.01 else 1)
        lengths.collected(plan, StepResult(step=step, slots=slots, seconds=measured))
        tokens += sum(len(slot.tokens) for slot in slots) / batch
        time += true
        left = k
    return tokens / time


def check(cost: Callable[[int, int], float], batch: int, acceptance: float, steps: int) -> None:
    """With all that it tries: within 5 % of the best fixed K, and at most 2 % slower than no drafts."""
    fixed = [long_run(cost, batch, acceptance, k, 1) for k in range(MAX_K + 1)]
    found = long_run(cost, batch, acceptance, None, steps)
    assert found > 0.98 * fixed[0], (acceptance, found, fixed)
    assert found > 0.95 * max(fixed), (acceptance, found, fixed)


@pytest.mark.parametrize("batch", [1, 6, 256])
@pytest.mark.parametrize("cost", COSTS)
def test_never_slower_in_the_long_run(cost: Callable[[int, int], float], batch: int) -> None:
    for acceptance in (0.0, 0.4, 0.8):
        check(cost, batch, acceptance, 3000)


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 33, 64, 100, 256])
@pytest.mark.parametrize("cost", COSTS)
def test_never_slower_at_any_acceptance(cost: Callable[[int, int], float], batch: int) -> None:
    for acceptance in range(11):
        check(cost, batch, acceptance / 10, 5000)


def test_acceptance_that_comes_back_is_noticed() -> None:
    lengths, left, chosen = DraftLength("auto", 3), 0, []
    for step in range(6000):
        k = lengths.choose(1)
        plan = StepPlan(step=step, decode=[0], drafting=Drafting(left, k))
        lengths.planned(plan)
        right = left if step > 2000 else 0
        lengths.collected(plan, StepResult(step=step, slots=[RESULTS[left][right]], seconds=0.01 + 0.002 * (left + k)))
        chosen.append(k)
        left = k
    assert chosen[100:2000].count(0) > 0.97 * 1900
    assert chosen[4000:].count(3) > 0.85 * 2000, "others, nearly as good, are tried too"


def test_buckets() -> None:
    """What is measured is what is captured."""
    buckets = [bucket_of(batch) for batch in range(1, 257)]
    assert buckets[:10] == [1, 2, 4, 4, 8, 8, 8, 8, 10, 10]
    assert all(0 <= bucket - batch < max(bucket / 5, 3.1) for batch, bucket in enumerate(buckets, 1))
    assert all(bucket_of(bucket) == bucket for bucket in buckets)
    assert len(set(buckets)) == 24
