"""A prompt computed on one engine and continued on another gives the tokens of one engine, and moves the bytes it should."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine.harness import Harness

from .pair import Pair, pair

PROMPT = [(7 * i) % 150 + 3 for i in range(45)]
ALONE = {"disaggregation.role": "both"}
GREEDY: dict[str, Any] = {"max_tokens": 12}
SEEDED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 5, "top_k": 40, "repetition_penalty": 1.2}
FALLBACKS = ("local_prefills", "retries", "attempts_failed", "quarantined", "groups_stale", "connections_lost")


async def alone(model: Harness, prompts: list[list[int]], params: dict[str, Any]) -> list[list[int]]:
    async with model.engine(**ALONE) as engine:
        return [await engine.tokens(prompt, **params) for prompt in prompts]


def assert_nothing_went_wrong(both: Pair) -> None:
    stats = both.decode.stats
    assert {name: stats.get(name, 0) for name in FALLBACKS} == dict.fromkeys(FALLBACKS, 0)
    # Every prompt token that decode has came over the network or out of its tree: none was computed here.
    assert both.decode.engine.executor.programs.prefilled == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [1, 16, 17, 45, 200])
async def test_the_tokens_and_the_bytes_of_a_prompt(tiny: Harness, length: int, params: dict[str, Any]) -> None:
    prompt = (PROMPT * 5)[:length]
    [expected] = await alone(tiny, [prompt], params)
    async with pair(tiny, **{"scheduler.prefill_tokens": 40}) as both:
        outputs = await both.outputs(prompt, **params)
        assert [token for output in outputs for token in output.tokens] == expected
        report = outputs[0].handoff
        assert report is not None
        assert (report.received_bytes, report.saved_bytes, report.attempts) == (both.layout.bytes_of(length), 0, 1)
        assert both.prefill.stats["sent_bytes"] == report.received_bytes
        assert_nothing_went_wrong(both)


async def test_prefill_first_and_decode_later(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with pair(tiny) as both:
        outputs = await both.pull(PROMPT, **GREEDY)
        assert [token for output in outputs for token in output.tokens] == expected
        assert_nothing_went_wrong(both)


async def test_decode_asks_only_for_what_its_tree_lacks(tiny: Harness) -> None:
    """A chat: each turn's prompt is the last one, its answer, and some more."""
    turns, history = [], list(PROMPT)
    async with tiny.engine(**ALONE) as engine:
        for turn in range(4):
            answer = await engine.tokens(history, **GREEDY)
            turns.append((list(history), answer))
            history += [*answer, *[(3 * i + turn) % 150 + 3 for i in range(20)]]
    async with pair(tiny) as both:
        for prompt, answer in turns:
            outputs = await both.outputs(prompt, **GREEDY)
            assert [token for output in outputs for token in output.tokens] == answer
            held = outputs[0].cached_tokens
            report = outputs[0].handoff
            assert report is not None
            assert report.saved_bytes == both.layout.bytes_of(held)
            assert report.received_bytes == both.layout.bytes_of(len(prompt)) - both.layout.bytes_of(held)
        # The answer before is in the tree too, but for its last token and what does not fill a page.
        assert held == (len(turns[-2][0]) + len(turns[-2][1]) - 1) // 16 * 16
        assert_nothing_went_wrong(both)


async def test_prefill_has_a_prefix_that_decode_lacks(tiny: Harness) -> None:
    [expected] = await alone(tiny, [[*PROMPT, 9, 8, 7]], GREEDY)
    async with pair(tiny) as both:
        await both.prefill.tokens(PROMPT, max_tokens=1)
        outputs = await both.outputs([*PROMPT, 9, 8, 7], **GREEDY)
        assert [token for output in outputs for token in output.tokens] == expected
        report = outputs[0].handoff
        assert report is not None
        assert report.received_bytes == both.layout.bytes_of(len(PROMPT) + 3)
        assert_nothing_went_wrong(both)


async def test_decode_has_a_prefix_that_prefill_lacks(tiny: Harness) -> None:
    [expected] = await alone(tiny, [[*PROMPT, 9, 8, 7]], GREEDY)
    async with pair(tiny) as both:
        await both.outputs(PROMPT, **GREEDY)
        both.prefill.engine.clear_cache()
        outputs = await both.outputs([*PROMPT, 9, 8, 7], **GREEDY)
        assert [token for output in outputs for token in output.tokens] == expected
        assert outputs[0].cached_tokens == 32
        assert_nothing_went_wrong(both)


async def test_many_at_once_with_choices_of_one_prompt(tiny: Harness) -> None:
    prompts = [[*PROMPT[: 10 + 7 * i], 100 + i] for i in range(5)]
    jobs = [(prompt, {**SEEDED, "seed": seed}) for prompt in prompts for seed in (1, 2, 3)]
    async with tiny.engine(**ALONE) as engine:
        expected = [await engine.tokens(prompt, **params) for prompt, params in jobs]
    async with pair(tiny, **{"scheduler.prefill_tokens": 32}) as both:
        found = await asyncio.gather(*(both.tokens(prompt, **params) for prompt, params in jobs))
        assert found == expected
        assert_nothing_went_wrong(both)


async def test_the_first_token_may_be_the_last(tiny: Harness) -> None:
    [[first, *_]] = await alone(tiny, [PROMPT], GREEDY)
    async with pair(tiny) as both:
        for params, reason in (({"max_tokens": 1}, "length"), ({"stop_token_ids": (first,), "max_tokens": 5}, "stop")):
            outputs = await both.outputs(PROMPT, **params)
            assert [(output.tokens, output.finish_reason) for output in outputs] == [([first], reason)]
        assert_nothing_went_wrong(both)


async def test_logprobs_of_the_first_token_come_along(tiny: Harness) -> None:
    async with tiny.engine(**ALONE) as engine:
        expected = [lp for output in await engine.outputs(engine.submit(PROMPT, logprobs=3)) for lp in output.logprobs or []]
    async with pair(tiny) as both:
        found = [lp for output in await both.outputs(PROMPT, logprobs=3) for lp in output.logprobs or []]
    assert [(lp.token, lp.rank, lp.top) for lp in found] == [(lp.token, lp.rank, lp.top) for lp in expected]


async def test_clients_that_leave(tiny: Harness) -> None:
    """At every stage; what leaks would show when the pair closes."""
    long = PROMPT * 6
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with pair(tiny, **{"scheduler.prefill_tokens": 16}) as both:
        for turns in (0, 1, 2, 4, 8, 16, 32, 64):
            first, second = both.submit(long, max_tokens=30)
            for _ in range(turns):
                await asyncio.sleep(0.001)
            both.decode.connection.abort([second])
            if turns % 3:
                both.prefill.connection.abort([first])
        assert await both.tokens(PROMPT, **GREEDY) == expected


async def test_pages_that_are_short_are_waited_for(tiny: Harness) -> None:
    """A decode engine with room for two of the prompts."""
    prompts = [[*PROMPT[:40], 50 + i] for i in range(6)]
    expected = await alone(tiny, prompts, GREEDY)
    async with pair(tiny, decode={"kv.memory": f"{10 * tiny.page_bytes(16)}B", "model.max_model_len": 96}) as both:
        assert await asyncio.gather(*(both.tokens(prompt, **GREEDY) for prompt in prompts)) == expected
        assert both.decode.stats.get("local_prefills", 0) == 0


async def test_one_slot_and_pages_that_are_short(tiny: Harness) -> None:
    """Prompts that have come wait for the slot of one that is short of their pages: the last of them is computed again."""
    prompts = [[*PROMPT[:40], 50 + i] for i in range(4)]
    params = {**GREEDY, "max_tokens": 50, "ignore_eos": True}
    expected = await alone(tiny, prompts, params)
    decode = {"kv.memory": f"{10 * tiny.page_bytes(16)}B", "model.max_model_len": 96, "scheduler.max_running": 1}
    async with pair(tiny, decode=decode) as both, asyncio.timeout(60):
        assert await asyncio.gather(*(both.tokens(prompt, **params) for prompt in prompts)) == expected
