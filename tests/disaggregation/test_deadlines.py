"""One handoff has one time, which its waits, attempts and engines draw from; then decode computes the prompt itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.harness import Harness

from fluentllm.core.types import Handoff

from .pair import DECODE, KEY, PREFILL, Pair, side
from .test_handoff import GREEDY, PROMPT, alone

NEVER = 600.0
"""Seconds. What a test with this in a setting waits for must not be that."""
PATIENT = {
    "plugins.kv_layerwise.key": KEY,
    "plugins.kv_layerwise.connect_timeout": NEVER,
    "plugins.kv_layerwise.wait_timeout": NEVER,
    "plugins.kv_layerwise.transfer_timeout": NEVER,
    "plugins.kv_layerwise.attempts": 100,
    "plugins.kv_layerwise.breaker_failures": 1000,
}


@asynccontextmanager
async def silent() -> AsyncIterator[int]:
    """A port that takes connections and never says anything."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def test_a_peer_that_never_answers(tiny: Harness) -> None:
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with silent() as port:
        limits = {"plugins.kv_layerwise.handoff_timeout": 0.2, "plugins.kv_layerwise.peers": [f"127.0.0.1:{port}"]}
        async with side(tiny, **DECODE, **PATIENT, **limits) as decode:
            assert await decode.rest(decode.hand(PROMPT, Handoff(id="a", host="127.0.0.1", port=port), **GREEDY)) == expected
            assert (decode.stats["deadline_handoff"], decode.stats["local_deadline"]) == (1, 1)


async def test_attempts_that_fail_one_after_another(tiny: Harness) -> None:
    """Each takes less than any deadline of its own, and a hundred are allowed."""
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    lossy = {"plugins.kv_layerwise.faults": {"drop": 1.0}}
    async with side(tiny, **PATIENT, **PREFILL, **lossy) as prefill:
        limits = {"plugins.kv_layerwise.handoff_timeout": 1.0, "plugins.kv_layerwise.peers": [f"127.0.0.1:{prefill.port}"]}
        async with side(tiny, **DECODE, **PATIENT, **limits) as decode:
            assert await Pair(prefill, decode).tokens(PROMPT, **GREEDY) == expected
            assert (decode.stats["deadline_handoff"], decode.stats["local_prefills"]) == (1, 1)
            assert decode.stats.get("deadline_transfer", 0) == 0
            while prefill.stats["open"] or decode.stats["open"]:
                await asyncio.sleep(0.01)


async def test_whom_one_waits_for_in_vain_is_not_the_only_one(tiny: Harness) -> None:
    """The peer's wait is over: another engine computes the prompt, not this one."""
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with silent() as port, side(tiny, **PATIENT, **PREFILL) as other:
        peers = [f"127.0.0.1:{port}", f"127.0.0.1:{other.port}"]
        limits = {**PATIENT, "plugins.kv_layerwise.wait_timeout": 0.2, "plugins.kv_layerwise.peers": peers}
        async with side(tiny, **DECODE, **limits) as decode:
            # Known to be there: its connection stands before the wait that is tested.
            assert await Pair(other, decode).tokens([*PROMPT, 3], **GREEDY)
            before = dict(decode.stats)
            assert await decode.rest(decode.hand(PROMPT, Handoff(id="a", host="127.0.0.1", port=port), **GREEDY)) == expected
            grown = {name: count - before.get(name, 0) for name, count in decode.stats.items()}
            assert (grown["deadline_wait"], grown["rerouted"], other.stats["requests_told"]) == (1, 1, 1)
            assert grown["handoffs_received"] == 1
            assert decode.stats.get("local_prefills", 0) == 0
