"""The choice of K from times and acceptance that are made up."""

from __future__ import annotations

from collections.abc import Callable

from fluentllm.core.draft_length import DraftLength
from fluentllm.core.types import Drafting, SlotResult, StepPlan, StepResult


def simulate(lengths: DraftLength, seconds: Callable[[int, int], float], right: int, steps: int, batch: int = 4) -> list[int]:
    """Steps of `batch` sequences whose first `right` drafts are always right; a change of K costs a second → the Ks."""
    chosen, left = [], 0
    for step in range(steps):
        k = lengths.choose(batch)
        plan = StepPlan(step=step, decode=list(range(batch)), drafting=Drafting(left, k))
        slots = [
            SlotResult(i, 1, [0] * (min(left, right) + 1), None, drafted=left, accepted=min(left, right)) for i in range(batch)
        ]
        time = seconds(left, k) + (left != k)
        lengths.collected(plan, StepResult(step=step, slots=slots, seconds=time))
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
    chosen = simulate(DraftLength("auto", 3), lambda verify, draft: 0.010 * (1 + verify), 2, 200)
    assert chosen[30:].count(0) > 0.9 * len(chosen[30:])
    assert 3 in chosen[30:], "it is tried again"


def test_steps_that_change_k_are_not_measured() -> None:
    lengths = DraftLength("auto", 2)
    simulate(lengths, lambda verify, draft: 0.01, 2, 100)
    assert all(abs(time - 0.01) < 1e-9 for time in lengths._times.values())


def test_a_fixed_k_stays() -> None:
    assert set(simulate(DraftLength(3, 5), lambda verify, draft: 1.0 + verify, 0, 50)) == {3}
