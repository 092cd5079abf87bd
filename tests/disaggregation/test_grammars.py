"""Requests with grammars are handed over like others: both engines compile, decode goes on from the first token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from engine.harness import Harness
from engine.test_entrance import Brace, Slow, grammar, plugins_with
from speculation.test_grammars import PAIRS, WORDS, allows
from speculation.test_host_grammars import OPEN

from fluentllm.core.types import GrammarSpec, Handoff

from .pair import DECODE, PREFILL, Side, pair, side
from .test_failures import QUICK
from .test_handoff import ALONE, PROMPT
from .test_rerouting import COMMON, stats_of

LONG = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}


async def told(slow: Slow, source: str, count: int) -> None:
    """`count` engines have been asked to compile it."""
    while len(slow.futures.get(source, ())) < count:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("way", ["at once", "pull"])
@pytest.mark.parametrize("spec", [WORDS, PAIRS])
async def test_tables(tiny: Harness, spec: GrammarSpec, way: str) -> None:
    params = {**LONG, "grammar": GrammarSpec(kind="slow", source=spec.source)}
    slow = Slow()
    async with tiny.engine(plugins=plugins_with(slow), **ALONE) as running:
        expecting = running.submit(PROMPT, **params)
        slow.futures[spec.source][0].set_result(slow.toy.compile(spec.source))
        expected = await running.rest(expecting)
    slow = Slow()
    async with pair(tiny, plugins=plugins_with(slow), **QUICK) as both:
        hand = both.outputs if way == "at once" else both.pull
        answer = asyncio.create_task(hand(PROMPT, **params))
        for number in (1, 2):
            await told(slow, spec.source, number)
            slow.futures[spec.source][number - 1].set_result(slow.toy.compile(spec.source))
        outputs = await answer
        found = [token for output in outputs for token in output.tokens]
        assert outputs[0].handoff is not None
        assert outputs[0].handoff.received_bytes > 0
        assert both.decode.stats.get("local_prefills", 0) == 0
    assert found == expected
    assert allows(spec, found)


async def test_matchers_on_the_host(tiny: Harness) -> None:
    slow = Slow()
    async with pair(tiny, plugins=plugins_with(slow), **QUICK) as both:
        answer = asyncio.create_task(both.tokens(PROMPT, **LONG, grammar=grammar("a")))
        await told(slow, "a", 2)
        for future in slow.futures["a"]:
            future.set_result(Brace())
        found = await answer
        assert both.decode.stats.get("local_prefills", 0) == 0
    assert found[0] in OPEN
    matcher = Brace().matcher()
    assert all(matcher.accept(token) for token in found)


@asynccontextmanager
async def turned_to_another(tiny: Harness) -> AsyncIterator[tuple[Slow, Side, Side, str]]:
    """The engine that a request names is not there; decode has compiled its grammar and told another one, which compiles."""
    slow = Slow()
    plugins: dict[str, Any] = {"plugins": plugins_with(slow)}
    async with side(tiny, **COMMON, **PREFILL, **plugins) as other:
        peers = {"plugins.kv_layerwise.peers": ["127.0.0.1:9", f"127.0.0.1:{other.port}"]}
        async with side(tiny, **COMMON, **DECODE, **peers, **plugins) as decode:
            request = decode.hand(PROMPT, Handoff(id="a", host="127.0.0.1", port=9), **LONG, grammar=grammar("a"))
            slow.futures["a"][0].set_result(Brace())
            await told(slow, "a", 2)
            yield slow, other, decode, request


async def test_another_engine_is_told_the_grammar_too(tiny: Harness) -> None:
    async with turned_to_another(tiny) as (slow, other, decode, request):
        await asyncio.sleep(0.02)
        slow.futures["a"][1].set_result(Brace())
        outputs = await decode.outputs(request)
        assert outputs[0].tokens[0] in OPEN
        assert outputs[0].handoff is not None
        assert outputs[0].handoff.received_bytes > 0
        assert decode.stats["rerouted"] == decode.stats["requests_told"] == other.stats["requests_told"] == 1
        assert decode.stats.get("local_prefills", 0) == 0


async def test_who_leaves_while_another_compiles(tiny: Harness) -> None:
    """What decode told it is computed for nobody, or not at all, and nothing of it stays."""
    async with turned_to_another(tiny) as (slow, other, decode, request):
        decode.connection.abort([request])
        await asyncio.sleep(0.05)
        slow.futures["a"][1].set_result(Brace())
        while stats_of(other, decode)["open"] or other.engine.has_work:
            await asyncio.sleep(0.01)
