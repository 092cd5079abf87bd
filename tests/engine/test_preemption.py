"""A newcomer of higher priority takes a running request's place; the one that yields comes back by way of the prefix cache."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from fluentllm.core.types import StepPlan, StepResult

from .harness import Harness, Running

PROMPT = [5 + i % 90 for i in range(100)]
LONG = {"max_tokens": 120, "ignore_eos": True}


def record_plans(running: Running) -> list[StepPlan]:
    plans: list[StepPlan] = []
    launch = running.engine.executor.launch

    def recording(plan: StepPlan) -> Future[StepResult]:
        plans.append(plan)
        return launch(plan)

    running.engine.executor.launch = recording  # type: ignore[method-assign]
    return plans


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_a_newcomer_of_higher_priority_runs_at_once(exact: Harness, depth: int) -> None:
    async with exact.engine(**{"kv.prefix_cache": False}) as running:
        expected = await running.tokens(PROMPT, **LONG)
    async with exact.engine(**{"scheduler.max_running": 1, "engine.overlap_depth": depth}) as running:
        plans = record_plans(running)
        patient = running.submit(PROMPT, priority=3, **LONG)
        first = await running.first(patient)
        urgent = running.submit([7, 8, 9], priority=1, max_tokens=4, ignore_eos=True)
        await running.rest(urgent)
        assert patient in running.connection.sequences, "the urgent one did not wait for it"
        assert first.tokens + await running.rest(patient) == expected
        assert running.engine.stats().preemptions == 1
    [began, _, again] = [init for plan in plans for init in plan.admit]
    assert (began.cached, len(began.tokens)) == (0, 100)
    assert len(again.tokens) > 100, "it goes on where it was"
    # All but the last page or two are still there.
    assert again.cached >= len(again.tokens) - 2 * 16


async def test_equals_wait_their_turn(exact: Harness) -> None:
    async with exact.engine(**{"scheduler.max_running": 1}) as running:
        first = running.submit(PROMPT, **LONG)
        await running.first(first)
        second = running.submit([7, 8, 9], max_tokens=4, ignore_eos=True)
        await running.rest(second)
        assert first not in running.connection.sequences
        assert running.engine.stats().preemptions == 0
