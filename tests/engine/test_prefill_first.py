"""`scheduler.prefill_first`: while a prompt can be computed nobody decodes, and every answer is what it is without."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .harness import Harness
from .test_preemption import record_plans

PROMPTS = [[3 + (7 * i + j) % 150 for j in range(length)] for i, length in enumerate((70, 5, 33, 64, 1, 100))]
WORK: list[dict[str, Any]] = [
    {"max_tokens": 60},
    {"max_tokens": 90, "temperature": 1.0, "seed": 5},
    {"max_tokens": 60},
    {"max_tokens": 70, "repetition_penalty": 1.3},
    {"max_tokens": 90, "temperature": 0.7, "seed": 6, "top_p": 0.8},
    {"max_tokens": 40},
]


async def test_nobody_decodes_beside_a_prompt(exact: Harness) -> None:
    async with exact.engine(**{"scheduler.prefill_tokens": 16, "scheduler.prefill_first": True}) as running:
        plans = record_plans(running)
        first = running.submit(PROMPTS[1], max_tokens=40, ignore_eos=True)
        await running.first(first)
        second = running.submit(PROMPTS[0], max_tokens=4, ignore_eos=True)
        assert len(await running.rest(second)) == 4
        await running.rest(first)
    assert not any(plan.prefill and plan.decode for plan in plans)
    of_second = [i for i, plan in enumerate(plans) if plan.prefill][1:]
    assert [sum(chunk.count for chunk in plans[i].prefill) for i in of_second] == [16, 16, 16, 16, 6]
    assert of_second == list(range(of_second[0], of_second[0] + 5)), "its chunks follow each other"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("method", ["none", "pld"])
async def test_no_token_changes(exact: Harness, depth: int, method: str) -> None:
    """With prompts in chunks, fewer slots than requests, and pages for two or three of them: some are preempted."""
    async with exact.engine() as running:
        alone = [await running.tokens(prompt, ignore_eos=True, **given) for prompt, given in zip(PROMPTS, WORK, strict=True)]
    small = {
        "kv.memory": f"{exact.page_bytes(16) * 12}B",
        "model.max_model_len": 160,
        "scheduler.max_running": 4,
        "scheduler.prefill_tokens": 32,
        "scheduler.prefill_first": True,
        "engine.overlap_depth": depth,
        "speculative.method": method,
        "speculative.k": 2,
    }
    async with exact.engine(**small) as running:
        together = [running.submit(prompt, ignore_eos=True, **given) for prompt, given in zip(PROMPTS, WORK, strict=True)]
        assert await asyncio.gather(*map(running.rest, together)) == alone
        assert running.engine.stats().preemptions, "the pool was too large for this test"


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_pages_given_up_go_to_who_was_short_of_them(exact: Harness, depth: int) -> None:
    """Two that fill the pool. Who gives up its pages while a step names it is not computed again with these very pages, to give
    them up once more, token by token."""
    short = {
        "kv.memory": f"{exact.page_bytes(16) * 16}B",
        "model.max_model_len": 200,
        "kv.prefix_cache": False,
        "scheduler.prefill_first": True,
        "engine.overlap_depth": depth,
    }
    prompts = [5 + i % 90 for i in range(100)], [6 + i % 90 for i in range(94)]
    async with exact.engine(**short) as running:
        plans = record_plans(running)
        ids = [running.submit(prompt, max_tokens=90, ignore_eos=True) for prompt in prompts]
        await asyncio.gather(*map(running.rest, ids))
        assert running.engine.stats().preemptions == 1
    assert len([chunk for plan in plans for chunk in plan.prefill]) == 3
