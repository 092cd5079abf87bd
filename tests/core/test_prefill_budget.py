"""How many prompt tokens a step may hold beside decodes."""

from __future__ import annotations

import pytest

from fluentllm.core.prefill_budget import LEAST, PrefillBudget
from fluentllm.core.types import PrefillChunk, StepPlan, StepResult


def step(budget: PrefillBudget, decoding: int, prompt_tokens: int, seconds: float) -> None:
    prefill = [PrefillChunk(99, 0, prompt_tokens, False)] if prompt_tokens else []
    plan = StepPlan(step=0, prefill=prefill, decode=list(range(decoding)))
    budget.collected(plan, StepResult(step=0, slots=[], seconds=seconds))


def cost(decoding: int, prompt_tokens: int, token: float = 1e-5) -> float:
    return 0.005 + 1e-4 * decoding + token * prompt_tokens


def test_steps_stay_within_the_ratio_once_times_are_known() -> None:
    budget = PrefillBudget(8192, 4.0)
    assert budget.tokens(8) == 8192
    step(budget, 8, 0, cost(8, 0))
    step(budget, 8, 8192, cost(8, 8192))
    for _ in range(20):
        tokens = budget.tokens(8)
        step(budget, 8, tokens, cost(8, tokens))
        assert cost(8, tokens) <= 4.0 * cost(8, 0) * 1.001
    assert budget.tokens(8) == pytest.approx(3 * cost(8, 0) / 1e-5, rel=0.01)


def test_dearer_tokens_come_in_smaller_chunks() -> None:
    budget = PrefillBudget(8192, 4.0)
    step(budget, 8, 0, cost(8, 0))
    for _ in range(40):
        tokens = budget.tokens(8)
        step(budget, 8, tokens, cost(8, tokens, token=4e-5))
    assert cost(8, budget.tokens(8), token=4e-5) <= 4.0 * cost(8, 0) * 1.01


@pytest.mark.parametrize("floor", [0.03, 0.3])
def test_what_a_smaller_chunk_would_not_spare_is_not_charged_to_tokens(floor: float) -> None:
    """Where the host launches kernel by kernel, a step with a prompt takes `floor` at least: no reason to shrink chunks."""
    budget, token = PrefillBudget(8192, 4.0), 2e-6
    for tokens in (0, 8192, 100, 3000):
        step(budget, 8, tokens, cost(8, 0) + (max(floor, token * tokens) if tokens else 0.0))
    used = []
    for _ in range(60):
        used.append(budget.tokens(8))
        step(budget, 8, used[-1], cost(8, 0) + max(floor, token * used[-1]))
    assert sum(used[10:]) / 50 >= min(8192, floor / token) / 2
    assert min(used[10:]) > 1000


def test_a_fixed_part_is_told_from_the_tokens() -> None:
    budget = PrefillBudget(8192, 4.0)
    step(budget, 8, 0, cost(8, 0))
    for _ in range(30):
        tokens = budget.tokens(8)
        step(budget, 8, tokens, cost(8, tokens) + 0.004)
    allowed = 3 * cost(8, 0)
    assert budget.tokens(8) == pytest.approx((allowed - 0.004) / 1e-5, rel=0.02)


def test_nobody_waits_nobody_bounds() -> None:
    bounded, free = PrefillBudget(8192, 2.0), PrefillBudget(8192, None)
    for budget in (bounded, free):
        step(budget, 8, 0, cost(8, 0))
        step(budget, 8, 8192, cost(8, 8192))
    assert bounded.tokens(0) == 8192
    assert bounded.tokens(8) < 2000
    assert free.tokens(8) == 8192


def test_a_prompt_always_gets_on() -> None:
    budget = PrefillBudget(8192, 1.001)
    step(budget, 1, 0, 1e-3)
    step(budget, 1, 1000, 10.0)
    assert budget.tokens(1) == LEAST
