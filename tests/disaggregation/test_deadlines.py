"""One handoff has one time, which its waits, attempts and engines draw from; then decode computes the prompt itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.harness import Harness

from fluentllm.core.types import Handoff
from fluentllm.transfer.link import Link

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


class Line:
    """A network between decode and a prefill engine's control port, which can fall silent: both ends stay connected."""

    def __init__(self, port: int) -> None:
        self._far = port
        self.cut = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Line:
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far)
        for source, target in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, target)))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if not self.cut.is_set():
                    target.write(data)
        finally:
            target.close()


async def test_a_connection_that_falls_silent(tiny: Harness) -> None:
    """Nothing comes in time, nobody says that it is drained: the pages are in quarantine until memory is registered anew."""
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    keep = {"plugins.kv_layerwise.keep_timeout": 2.0}
    async with side(tiny, **PATIENT, **keep, **PREFILL) as prefill, Line(prefill.port) as line:
        limits = {
            "plugins.kv_layerwise.transfer_timeout": 1.0,
            "plugins.kv_layerwise.drain_timeout": 0.3,
            "plugins.kv_layerwise.attempts": 1,
            "plugins.kv_layerwise.peers": [f"127.0.0.1:{line.port}"],
            "kv.prefix_cache": False,
        }
        async with side(tiny, **DECODE, **{**PATIENT, **limits}) as decode:

            async def ask(name: str) -> None:
                here = prefill.hand(PROMPT, Handoff(id=name, concurrent=True), **GREEDY)
                there = Handoff(id=name, host="127.0.0.1", port=line.port, concurrent=True)
                assert await decode.rest(decode.hand(PROMPT, there, **GREEDY)) == expected
                await prefill.rest(here)

            async def until_received() -> None:
                """On a slow machine the time may be too short for one."""
                before, asked = decode.stats.get("handoffs_received", 0), 0
                while decode.stats.get("handoffs_received", 0) == before:
                    asked += 1
                    await ask(f"{before}-{asked}")
                while decode.stats["open"]:
                    await asyncio.sleep(0.01)

            await until_received()
            before = decode.stats
            line.cut.set()
            await ask("cut")
            while decode.stats["open"]:
                await asyncio.sleep(0.01)
            names = ("deadline_transfer", "local_timeout", "deadline_drain", "quarantined", "registrations", "connections_lost")
            assert [decode.stats[name] - before.get(name, 0) for name in names] == [1] * len(names)
            assert decode.stats["quarantined_pages"] == 0
            line.cut.clear()
            await until_received()
            while prefill.stats["open"]:  # that nobody wants the one that was cut it was not told
                await asyncio.sleep(0.01)
            assert prefill.stats["deadline_keep"] >= 1


async def test_a_connection_that_does_not_describe_itself(tiny: Harness) -> None:
    async with side(tiny, **{**PATIENT, "plugins.kv_layerwise.connect_timeout": 0.2}, **PREFILL) as prefill:
        link = await Link.open("127.0.0.1", prefill.port, KEY.encode(), timeout=30)
        lost = asyncio.Event()
        link.listen(lambda message: None, lambda error: lost.set())
        await lost.wait()
        assert prefill.stats["deadline_describe"] == 1
        assert prefill.stats["open"] == 0


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


async def test_a_half_that_the_router_has_lost(tiny: Harness) -> None:
    """Prefill has never heard of the request, and waits for it: after the first attempt decode tells it."""
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with side(tiny, **PATIENT, **PREFILL) as prefill:
        limits = {
            "plugins.kv_layerwise.transfer_timeout": 1.0,
            "plugins.kv_layerwise.handoff_timeout": NEVER,
            "plugins.kv_layerwise.peers": [f"127.0.0.1:{prefill.port}"],
        }
        async with side(tiny, **DECODE, **{**PATIENT, **limits}) as decode:
            there = Handoff(id="a", host="127.0.0.1", port=prefill.port, concurrent=True)
            assert await decode.rest(decode.hand(PROMPT, there, **GREEDY)) == expected
            assert decode.stats["deadline_transfer"] >= 1
            assert (prefill.stats["requests_told"], decode.stats["handoffs_received"]) == (1, 1)
            while prefill.stats["open"] or decode.stats["open"]:
                await asyncio.sleep(0.01)


async def test_whom_one_waits_for_in_vain_is_not_the_only_one(tiny: Harness) -> None:
    """The peer's wait is over: another engine computes the prompt, not this one."""
    [expected] = await alone(tiny, [PROMPT], GREEDY)
    async with silent() as port, side(tiny, **PATIENT, **PREFILL) as other:
        peers = [f"127.0.0.1:{port}", f"127.0.0.1:{other.port}"]
        limits = {**PATIENT, "plugins.kv_layerwise.wait_timeout": 0.5, "plugins.kv_layerwise.peers": peers}
        async with side(tiny, **DECODE, **limits) as decode:
            # The other's connection stands before the wait that is tested; on a slow machine that may take longer than it.
            while not decode.stats.get("handoffs_received", 0):
                await Pair(other, decode).tokens([*PROMPT, 3], **GREEDY)
            before, told = dict(decode.stats), other.stats.get("requests_told", 0)
            assert await decode.rest(decode.hand(PROMPT, Handoff(id="a", host="127.0.0.1", port=port), **GREEDY)) == expected
            grown = {name: count - before.get(name, 0) for name, count in decode.stats.items()}
            assert (grown["deadline_wait"], grown["rerouted"], other.stats["requests_told"] - told) == (1, 1, 1)
            assert (grown["handoffs_received"], grown.get("local_prefills", 0)) == (1, 0)
