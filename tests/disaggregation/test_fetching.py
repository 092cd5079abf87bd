"""Prefill brings a prefix that decode has and it lacks from there, instead of computing it again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine.harness import Harness

from fluentllm.core.types import Handoff

from .pair import Pair, pair
from .test_failures import QUICK
from .test_handoff import ALONE, GREEDY, PROMPT, assert_nothing_went_wrong

ALWAYS = {"plugins.kv_layerwise.fetch": "always", "plugins.kv_layerwise.fetch_wait": 5.0}


async def second_turn(both: Pair, tiny: Harness) -> tuple[list[int], list[int]]:
    """A chat's first turn; then prefill forgets everything → the next prompt, and what one engine answers to it."""
    async with tiny.engine(**ALONE) as engine:
        answer = await engine.tokens(PROMPT, **GREEDY)
        prompt = [*PROMPT, *answer, 9, 8, 7]
        expected = await engine.tokens(prompt, **GREEDY)
    assert await both.tokens(PROMPT, **GREEDY) == answer
    both.prefill.engine.clear_cache()
    return prompt, expected


@pytest.mark.parametrize("asked_first", [False, True])
@pytest.mark.parametrize("chunk", [16, 4096])
async def test_the_bytes_and_the_tokens(tiny: Harness, asked_first: bool, chunk: int) -> None:
    async with pair(
        tiny, **{"scheduler.prefill_tokens": chunk}, prefill={**ALWAYS, "plugins.kv_layerwise.checksums": True}
    ) as both:
        prompt, expected = await second_turn(both, tiny)
        computed = both.prefill.engine.executor.programs.prefilled  # type: ignore[attr-defined]
        if asked_first:
            here = Handoff(id="x", concurrent=True)
            request = both.decode.hand(prompt, Handoff(id="x", host="127.0.0.1", port=both.prefill.port), **GREEDY)
            await asyncio.sleep(0.05)
            await both.prefill.outputs(both.prefill.hand(prompt, here, **GREEDY))
            outputs = await both.decode.outputs(request)
        else:
            outputs = await both.outputs(prompt, **GREEDY)
        assert [token for output in outputs for token in output.tokens] == expected
        # Decode has the pages that are full of the first prompt and its answer, whose last token has no KV.
        held = (len(PROMPT) + 12 - 1) // 16 * 16
        prefill, decode = both.prefill.stats, both.decode.stats
        assert prefill["fetched_tokens"] == decode["lent_tokens"] == held
        assert prefill["fetched_bytes"] == decode["lent_bytes"] == both.layout.bytes_of(held)
        assert both.prefill.engine.executor.programs.prefilled - computed == len(prompt) - held  # type: ignore[attr-defined]
        assert outputs[0].handoff is not None
        assert outputs[0].handoff.received_bytes == both.layout.bytes_of(len(prompt)) - both.layout.bytes_of(held)
        assert prefill.get("fetches_failed", 0) == prefill.get("quarantined", 0) == 0
        assert_nothing_went_wrong(both)
        # It has entered the tree: the third turn needs none of it.
        await both.outputs([*prompt, 5], **GREEDY)
        assert both.prefill.stats["fetched_tokens"] == held


async def test_by_measurement(tiny: Harness) -> None:
    """Over a network that is slower than computing nothing is fetched; over a fast one, if computing takes long, it is."""
    for bandwidth, seconds, fetched in ((1e6, 0.01, False), (0, 100.0, True)):
        slow: dict[str, Any] = {"plugins.kv_layerwise.faults": {"bytes_per_second": bandwidth}} if bandwidth else {}
        async with pair(tiny, prefill={"plugins.kv_layerwise.fetch_wait": 5.0, **slow}) as both:
            prompt, expected = await second_turn(both, tiny)
            assert both.prefill.engine.handoffs is not None
            pacing = both.prefill.engine.handoffs.exchange.pacing  # type: ignore[attr-defined]
            assert pacing.passes.readings
            assert pacing.transfers.readings
            for _ in range(50):  # as if the model were another: so many seconds for 45 tokens
                pacing.passed(seconds, 45)
                pacing.passed(2 * seconds, 90)
            assert await both.tokens(prompt, **GREEDY) == expected
            assert (both.prefill.stats.get("fetched_tokens", 0) > 0) == fetched
            assert_nothing_went_wrong(both)


@pytest.mark.parametrize(
    ("fault", "counter"),
    [
        ("drop", "deadline_fetch"),
        ("corrupt", "fetch_corrupt"),
        ("corrupt_note", "deadline_fetch"),
        ("disconnect", "fetches_failed"),
    ],
)
async def test_what_is_spoilt_on_the_way_is_computed(tiny: Harness, fault: str, counter: str) -> None:
    prefill = {**ALWAYS, "plugins.kv_layerwise.checksums": True, "plugins.kv_layerwise.fetch_timeout": 0.3}
    faulty = {"plugins.kv_layerwise.faults": {fault: 1.0}}
    async with pair(tiny, prefill=prefill, decode=faulty, **QUICK) as both:
        prompt, expected = await second_turn(both, tiny)
        assert await both.tokens(prompt, **GREEDY) == expected
        assert both.prefill.stats[counter] >= 1
        assert both.prefill.stats.get("fetched_tokens", 0) == 0
        if fault != "disconnect":
            assert_nothing_went_wrong(both)
        for one in (both.prefill, both.decode):
            while one.stats["open"] or one.stats["quarantined_pages"]:
                await asyncio.sleep(0.01)


async def test_clients_that_leave_at_every_stage(tiny: Harness) -> None:
    """What leaks would show when the pair closes."""
    delayed = {"plugins.kv_layerwise.faults": {"delay": 1.0, "delay_seconds": 0.03}}
    async with pair(tiny, prefill=ALWAYS, decode=delayed, **QUICK) as both:
        prompt, expected = await second_turn(both, tiny)
        for turn in range(8):
            both.prefill.engine.clear_cache()
            first, second = both.submit(prompt, **GREEDY)
            await asyncio.sleep(0.004 * turn)
            if turn % 3 != 1:
                both.prefill.connection.abort([first])
            if turn % 3:
                both.decode.connection.abort([second])
        both.prefill.engine.clear_cache()
        assert await both.tokens(prompt, **GREEDY) == expected


async def test_a_prompt_that_is_never_asked_for_is_computed_all_the_same(tiny: Harness) -> None:
    async with tiny.engine(**ALONE) as engine:
        expected = await engine.tokens(PROMPT, **GREEDY)
    async with pair(tiny, prefill={**ALWAYS, "plugins.kv_layerwise.fetch_wait": 0.1}, **QUICK) as both:
        request = both.prefill.hand(PROMPT, Handoff(id="n", concurrent=True), **GREEDY)
        assert [o.tokens for o in await both.prefill.outputs(request)] == [expected[:1]]
        assert both.prefill.stats["deadline_ask"] == 1
