"""What goes wrong between two engines: the answers stay the same, each fault is counted where it struck, and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from engine.harness import Harness, write_tiny_llama

from fluentllm.core.errors import InvalidRequest
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import Register
from fluentllm.core.transport import TransportContext
from fluentllm.core.types import Handoff
from fluentllm.plugins.kv_layerwise.breaker import Breaker
from fluentllm.plugins.kv_layerwise.quarantine import QuarantineFull
from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.transfer.layout import LayoutMismatch
from fluentllm.transfer.polled import PolledTransport

from .pair import DECODE, KEY, PREFILL, Pair, pair, side
from .test_handoff import GREEDY, PROMPT, alone

QUICK = {
    "plugins.kv_layerwise.transfer_timeout": 1.5,
    "plugins.kv_layerwise.wait_timeout": 5.0,
    "plugins.kv_layerwise.drain_timeout": 0.5,
    "plugins.kv_layerwise.keep_timeout": 3.0,
    "plugins.kv_layerwise.breaker_seconds": 0.2,
    "plugins.kv_layerwise.breaker_failures": 100,
}
FAULTS: dict[str, tuple[dict[str, float], str]] = {
    "drop": ({"drop": 0.2}, "failed_lost"),
    "corrupt": ({"corrupt": 0.3}, "groups_corrupt"),
    "corrupt_note": ({"corrupt_note": 0.2}, "notes_forged"),
    "duplicate": ({"duplicate": 0.5}, "notes_repeated"),
    "delay": ({"delay": 0.5, "delay_seconds": 0.1}, "groups_received"),
    "reorder": ({"reorder": 0.5}, "groups_received"),
    "disconnect": ({"disconnect": 0.1}, "connections_lost"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_kind_of_fault(tiny: Harness, fault: str) -> None:
    chances, counter = FAULTS[fault]
    prompts = [[*PROMPT, 3 + i] for i in range(8)]
    expected = await alone(tiny, prompts, GREEDY)
    faulty = {"plugins.kv_layerwise.faults": {"seed": 3, **chances}}
    async with pair(
        tiny, prefill=faulty, decode={"plugins.kv_layerwise.checksums": True}, **QUICK, **{"kv.prefix_cache": False}
    ) as both:
        assert await asyncio.gather(*(both.tokens(prompt, **GREEDY) for prompt in prompts)) == expected
        assert both.prefill.stats[f"transport_fault_{fault}"] > 0
        assert both.decode.stats.get(counter, 0) > 0
        if fault in ("duplicate", "delay", "reorder"):
            assert both.decode.stats.get("retries", 0) == both.decode.stats.get("local_prefills", 0) == 0
        if fault == "disconnect":
            while both.decode.stats["quarantined_pages"]:
                await asyncio.sleep(0.01)
            assert both.decode.stats["quarantined"] > 0
            assert both.decode.stats["registrations"] > 0


async def test_everything_at_once_with_clients_that_leave(tiny: Harness) -> None:
    """A small chaos; `benchmarks/disaggregation/chaos.py` has the large one, on processes that are killed."""
    random.seed(0)
    jobs = [([*PROMPT[: random.randrange(1, 45)], 3 + i], {"max_tokens": random.randrange(1, 12)}) for i in range(40)]
    async with tiny.engine(**{"disaggregation.role": "both"}) as engine:
        expected = [await engine.tokens(prompt, **params) for prompt, params in jobs]
    chances = {
        "drop": 0.03,
        "delay": 0.1,
        "duplicate": 0.1,
        "reorder": 0.1,
        "corrupt": 0.05,
        "corrupt_note": 0.03,
        "disconnect": 0.01,
    }
    faulty = {"plugins.kv_layerwise.faults": {"seed": 1, **chances}}
    async with pair(
        tiny, prefill=faulty, decode={"plugins.kv_layerwise.checksums": True}, **QUICK, **{"scheduler.prefill_tokens": 32}
    ) as both:

        async def one(number: int) -> list[int] | None:
            prompt, params = jobs[number]
            await asyncio.sleep(random.random())
            first, second = both.submit(prompt, **params)
            if number % 5 == 4:
                await asyncio.sleep(random.random() * 0.1)
                both.prefill.connection.abort([first])
                both.decode.connection.abort([second])
                return None
            return await both.decode.rest(second)

        found = await asyncio.gather(*map(one, range(len(jobs))))
        assert [tokens == whole for tokens, whole in zip(found, expected, strict=True) if tokens is not None] == [True] * 32


async def test_a_prefill_engine_that_is_not_there(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    overrides = {**DECODE, **QUICK, "plugins.kv_layerwise.key": KEY, "plugins.kv_layerwise.peers": ["127.0.0.1:9"]}
    overrides["plugins.kv_layerwise.breaker_failures"] = 2
    async with side(tiny, **overrides) as decode:
        for _ in range(3):
            assert await decode.rest(decode.hand(PROMPT, Handoff(id="x", host="127.0.0.1", port=9), **GREEDY)) == expected
        assert decode.stats["local_prefills"] == 3
        assert decode.stats["connections_failed"] >= 2
        assert decode.stats["local_breaker"] >= 1
        with pytest.raises(InvalidRequest, match=r"127\.0\.0\.1:10.*does not know"):
            decode.hand(PROMPT, Handoff(id="y", host="127.0.0.1", port=10))


async def test_a_prefill_engine_that_comes_back_is_another(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    common = {"plugins.kv_layerwise.key": KEY, **QUICK}
    async with side(tiny, **common, **PREFILL) as first:
        port = first.port
        async with side(
            tiny, **common, **DECODE, **{"plugins.kv_layerwise.peers": [f"127.0.0.1:{port}"], "kv.prefix_cache": False}
        ) as decode:
            assert await Pair(first, decode).tokens(PROMPT, **GREEDY) == expected
            first.engine.stop()
            await asyncio.sleep(0.1)
            # Nobody there: computed here.
            there = Handoff(id="gone", host="127.0.0.1", port=port)
            assert await decode.rest(decode.hand(PROMPT, there, **GREEDY)) == expected
            assert decode.stats["local_prefills"] == 1
            async with side(tiny, **common, **{**PREFILL, "plugins.kv_layerwise.port": port}) as second:
                assert await Pair(second, decode).tokens(PROMPT, **GREEDY) == expected
            assert decode.stats["local_prefills"] == 1
            assert decode.stats["handoffs_received"] == 2


@pytest.mark.parametrize("field", ["layers", "dtype"])
async def test_kv_that_does_not_fit_is_refused_with_both_layouts(
    tiny: Harness, tmp_path_factory: pytest.TempPathFactory, field: str
) -> None:
    layers, dtype, values = (3, "auto", (4, 3)) if field == "layers" else (4, "fp8", ("float32", "float8_e4m3fn"))
    folder = write_tiny_llama(tmp_path_factory.mktemp("other"), num_hidden_layers=layers)
    other = Harness(folder, **tiny.overrides, **{"kv.dtype": dtype})
    common = {"plugins.kv_layerwise.key": KEY, **QUICK}
    async with side(tiny, **common, **PREFILL) as prefill:
        peers = [f"127.0.0.1:{prefill.port}"]
        async with side(other, **common, **DECODE, **{"plugins.kv_layerwise.peers": peers}) as decode:
            refused: list[Any] = []
            decode.connection.deliver = refused.append
            there = Handoff(id="a", host="127.0.0.1", port=prefill.port)
            decode.hand(PROMPT, there)
            for _ in range(200):
                await asyncio.sleep(0.01)
                if refused:
                    break
            assert refused[0].code == LayoutMismatch.code
            assert f"{field} ({values[0]} and {values[1]})" in refused[0].message
            assert all(f"{field}={value}" in refused[0].message for value in values)
            with pytest.raises(LayoutMismatch):  # and from now on at once
                decode.hand(PROMPT, there)


async def test_a_wrong_key_opens_nothing(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with pair(tiny, decode={"plugins.kv_layerwise.key": "another key, 0123456789"}, **QUICK) as both:
        assert await both.tokens(PROMPT, **GREEDY) == expected
        assert both.prefill.stats["knocks_refused"] >= 1
        assert both.decode.stats["local_prefills"] == 1


async def test_an_ask_for_a_request_that_never_comes(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with pair(
        tiny, prefill={"plugins.kv_layerwise.wait_timeout": 0.2}, **{k: v for k, v in QUICK.items() if "wait" not in k}
    ) as both:
        there = Handoff(id="only decode", host="127.0.0.1", port=both.prefill.port)
        assert await both.decode.rest(both.decode.hand(PROMPT, there, **GREEDY)) == expected
        assert both.prefill.stats["deadline_request"] == 1
        # Then decode tells it the request.
        assert both.decode.stats["failed_unknown"] == both.prefill.stats["requests_told"] == 1
        assert both.decode.stats.get("local_prefills", 0) == 0


async def test_a_prompt_that_nobody_fetches_is_dropped(tiny: Harness) -> None:
    async with pair(tiny, **{**QUICK, "plugins.kv_layerwise.keep_timeout": 0.2}) as both:
        await both.prefill.outputs(both.prefill.hand(PROMPT, Handoff(id="nobody"), **GREEDY))
        await asyncio.sleep(0.4)
        assert both.prefill.stats["deadline_keep"] == 1
        assert both.prefill.stats["open"] == 0


async def test_two_halves_with_different_prompts(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with pair(tiny, **QUICK) as both:
        both.prefill.hand(PROMPT[:-1], Handoff(id="odd"), **GREEDY)
        there = Handoff(id="odd", host="127.0.0.1", port=both.prefill.port)
        assert await both.decode.rest(both.decode.hand(PROMPT, there, **GREEDY)) == expected
        assert both.prefill.stats["prompts_differ"] == 1


def test_the_breaker_half_opens() -> None:
    now = 0.0
    breaker = Breaker(2, 10.0, lambda: now)
    assert breaker.allows()
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert (breaker.state, breaker.allows()) == ("open", False)
    now = 10.0
    assert (breaker.state, breaker.allows(), breaker.allows()) == ("half open", True, False)
    breaker.failed()
    assert breaker.state == "open"
    now = 20.0
    assert breaker.allows()
    breaker.succeeded()
    assert (breaker.state, breaker.allows(), breaker.allows()) == ("closed", True, True)


class Sticky:
    """The loopback transport, as one that cannot stop a late writer."""

    @hookimpl
    def fluent_kv_transports(self, register: Register) -> None:
        def create(context: TransportContext) -> Any:
            wire = LoopbackWire()
            wire.revokes = False
            return PolledTransport(context, wire)

        register("sticky", create)


async def test_too_many_pages_in_quarantine_end_the_engine(tiny: Harness) -> None:
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"sticky": Sticky()})
    faulty = {"plugins.kv_layerwise.faults": {"disconnect": 1.0}}
    settings = {"disaggregation.transport": "sticky", "plugins.kv_layerwise.key": KEY, **QUICK}
    async with side(tiny, plugins=plugins, **{**PREFILL, **settings, **faulty}) as prefill:
        few = {"plugins.kv_layerwise.peers": [f"127.0.0.1:{prefill.port}"], "plugins.kv_layerwise.quarantine": 0.001}

        async def run() -> None:
            async with side(tiny, plugins=plugins, **{**DECODE, **settings, **few}) as decode:
                prefill.hand(PROMPT, Handoff(id="stuck"), **GREEDY)
                decode.hand(PROMPT, Handoff(id="stuck", host="127.0.0.1", port=prefill.port), **GREEDY)
                while decode.engine._failure is None:
                    await asyncio.sleep(0.01)

        with pytest.raises(QuarantineFull, match="pages are in quarantine"):
            await asyncio.wait_for(run(), 30)
