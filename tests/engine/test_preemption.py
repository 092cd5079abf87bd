"""A newcomer of higher priority takes a running request's place; the one that yields comes back by way of the prefix cache."""

from __future__ import annotations

import asyncio
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


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("prefill_first", [False, True])
async def test_who_yields_behind_its_last_chunk_stays_for_that_step(exact: Harness, depth: int, prefill_first: bool) -> None:
    """The step that computes a prompt's last chunk has tokens left for a newcomer, whose place is that very prompt's."""
    newcomer = [3 + 7 * i % 140 for i in range(60)]
    async with exact.engine(**{"kv.prefix_cache": False}) as running:
        expected = await running.tokens(PROMPT, max_tokens=30, ignore_eos=True)
        expected_of_newcomer = await running.tokens(newcomer, max_tokens=4, ignore_eos=True)
    settings = {"scheduler.max_running": 1, "scheduler.prefill_tokens": 32, "scheduler.prefill_first": prefill_first}
    async with exact.engine(**settings, **{"engine.overlap_depth": depth}) as running:
        plans = record_plans(running)
        patient = running.submit(PROMPT, priority=3, max_tokens=30, ignore_eos=True)
        while len(plans) < 3:  # of 32 tokens; the fourth is of 4
            await asyncio.sleep(0)
        urgent = running.submit(newcomer, priority=1, max_tokens=4, ignore_eos=True)
        assert await running.rest(urgent) == expected_of_newcomer
        assert await running.rest(patient) == expected
    for plan in plans:
        slots = [chunk.slot for chunk in plan.prefill]
        assert len(slots) == len(set(slots)), "two requests in one slot"


async def test_what_was_not_computed_again_is_not_cached(exact: Harness) -> None:
    """A front end has found a stop string in a request that is being computed again meanwhile."""
    other = [3 + 7 * i % 140 for i in range(90)]
    async with exact.engine(**{"kv.prefix_cache": False}) as running:
        answer = await running.tokens(PROMPT, max_tokens=40, ignore_eos=True)
    small = {
        "scheduler.max_running": 1,
        "scheduler.prefill_tokens": 16,
        "kv.memory": f"{exact.page_bytes(16) * 11}B",  # the urgent one needs ten
        "model.max_model_len": 165,
    }
    async with exact.engine(**small) as running:
        plans = record_plans(running)
        patient = running.submit(PROMPT, priority=3, max_tokens=60, ignore_eos=True)
        got: list[int] = []
        while len(got) < 25:
            got += (await running.first(patient)).tokens
        await running.rest(running.submit(other, priority=1, max_tokens=70, ignore_eos=True))
        while sum(len(plan.admit) for plan in plans) < 3:
            await asyncio.sleep(0)
        running.connection.abort([patient], "stop")
        assert not plans[-1].prefill[-1].last, "it came too late for this test"
        assert await running.tokens([*PROMPT, *answer[:20]], max_tokens=20, ignore_eos=True) == answer[20:]
