"""A prefill engine fails: another one is told the request and computes it, and the client notices only the delay."""

from __future__ import annotations

import asyncio
from typing import Any

from engine.harness import Harness

from fluentllm.core.types import Handoff

from .pair import DECODE, KEY, PREFILL, Pair, side
from .test_failures import QUICK
from .test_handoff import GREEDY, PROMPT, SEEDED, alone

COMMON = {"plugins.kv_layerwise.key": KEY, **QUICK}


def stats_of(*sides: Any) -> dict[str, int]:
    """Added up."""
    names = {name for one in sides for name in one.stats}
    return {name: sum(one.stats.get(name, 0) for one in sides) for name in names}


async def test_the_one_that_is_named_is_not_there(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], SEEDED)
    async with side(tiny, **COMMON, **PREFILL) as other:
        peers = {"plugins.kv_layerwise.peers": ["127.0.0.1:9", f"127.0.0.1:{other.port}"]}
        async with side(tiny, **COMMON, **DECODE, **peers) as decode:
            named = Handoff(id="a", host="127.0.0.1", port=9)
            outputs = await decode.outputs(decode.hand(PROMPT, named, **SEEDED, logprobs=2))
            assert [token for output in outputs for token in output.tokens] == expected
            assert outputs[0].handoff is not None
            assert outputs[0].handoff.received_bytes > 0
            assert len((outputs[0].logprobs or [])[0].top) == 2
            assert decode.stats["rerouted"] == decode.stats["requests_told"] == other.stats["requests_told"] == 1
            assert decode.stats.get("local_prefills", 0) == 0


async def test_the_one_that_is_named_ends_while_it_computes(tiny: Harness) -> None:
    prompts = [[*PROMPT * 8, 3 + i] for i in range(4)]
    expected = await alone(tiny, prompts, GREEDY)
    small = {"scheduler.prefill_tokens": 16, "plugins.kv_layerwise.fetch": "never"}
    async with side(tiny, **COMMON, **small, **PREFILL) as first, side(tiny, **COMMON, **PREFILL) as second:
        peers = {"plugins.kv_layerwise.peers": [f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"]}
        async with side(tiny, **COMMON, **DECODE, **peers) as decode:
            ids = [Pair(first, decode).submit(prompt, **GREEDY) for prompt in prompts]
            while first.stats.get("groups_sent", 0) < 2:
                await asyncio.sleep(0.001)
            first.connection.close()
            first.engine.stop()
            assert [await decode.rest(there) for _, there in ids] == expected
            assert decode.stats["rerouted"] >= 1
            assert second.stats["requests_told"] >= 1
            assert decode.stats.get("local_prefills", 0) == 0


async def test_one_whose_network_spoils_everything(tiny: Harness) -> None:
    """Tried again at the same engine, then elsewhere; what was asked of the first is forgotten there."""
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    spoilt = {"plugins.kv_layerwise.faults": {"corrupt": 1.0}}
    async with side(tiny, **COMMON, **PREFILL, **spoilt) as first, side(tiny, **COMMON, **PREFILL) as second:
        peers = {"plugins.kv_layerwise.peers": [f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"]}
        checked = {"plugins.kv_layerwise.checksums": True, "plugins.kv_layerwise.attempts": 2}
        async with side(tiny, **COMMON, **DECODE, **peers, **checked) as decode:
            assert await Pair(first, decode).tokens(PROMPT, **GREEDY) == expected
            assert decode.stats["groups_corrupt"] == 2
            assert (decode.stats["rerouted"], second.stats["requests_told"]) == (1, 1)
            assert decode.stats.get("local_prefills", 0) == 0
            while stats_of(first, second, decode)["open"]:
                await asyncio.sleep(0.01)


async def test_clients_that_leave_while_another_computes(tiny: Harness) -> None:
    """What decode told it, it takes back."""
    async with side(tiny, **COMMON, **PREFILL, **{"scheduler.prefill_tokens": 16}) as other:
        peers = {"plugins.kv_layerwise.peers": ["127.0.0.1:9", f"127.0.0.1:{other.port}"]}
        async with side(tiny, **COMMON, **DECODE, **peers) as decode:
            for number in range(6):
                named = Handoff(id=f"left-{number}", host="127.0.0.1", port=9)
                request = decode.hand([*PROMPT * 8, number + 3], named, **GREEDY)
                while other.stats.get("requests_told", 0) <= number:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.002 * number)
                decode.connection.abort([request])
            while stats_of(other, decode)["open"] or other.engine.scheduler.running or other.engine.scheduler.waiting:
                await asyncio.sleep(0.01)
