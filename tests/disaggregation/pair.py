"""A prefill engine and a decode engine, in one process over the loopback transport, driven as a router would."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from engine.harness import Harness, Running

from fluentllm.core.types import Handoff, Request, RequestOutput, SamplingParams

KEY = "only for tests, 0123456789abcdef"
PREFILL = {"disaggregation.role": "prefill", "disaggregation.transport": "loopback", "plugins.kv_layerwise.port": 0}
DECODE = {"disaggregation.role": "decode", "disaggregation.transport": "loopback"}
_ids = itertools.count()


class Side(Running):
    """An engine whose requests are handed over."""

    def hand(self, prompt: list[int], handoff: Handoff, **params: Any) -> str:
        request_id = f"handed-{next(self._ids)}"
        self._queues[request_id] = asyncio.Queue()
        settings = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params})
        self.connection.submit(Request(id=request_id, prompt=prompt, params=settings, handoff=handoff))
        return request_id

    @property
    def stats(self) -> dict[str, int]:
        return self.engine.stats().handoff

    @property
    def port(self) -> int:
        assert self.engine.handoffs is not None
        return self.engine.handoffs.door.port


class Pair:
    def __init__(self, prefill: Side, decode: Side) -> None:
        self.prefill, self.decode = prefill, decode

    def submit(self, prompt: list[int], **params: Any) -> tuple[str, str]:
        """To both at once, as with bootstrap_room → the two requests' ids."""
        name = f"room-{next(_ids)}"
        here = Handoff(id=name, concurrent=True)
        there = Handoff(id=name, host="127.0.0.1", port=self.prefill.port, concurrent=True)
        return self.prefill.hand(prompt, here, **params), self.decode.hand(prompt, there, **params)

    async def outputs(self, prompt: list[int], **params: Any) -> list[RequestOutput]:
        first, second = self.submit(prompt, **params)
        await self.prefill.outputs(first)
        return await self.decode.outputs(second)

    async def tokens(self, prompt: list[int], **params: Any) -> list[int]:
        return [token for output in await self.outputs(prompt, **params) for token in output.tokens]

    async def pull(self, prompt: list[int], **params: Any) -> list[RequestOutput]:
        """Prefill first; decode with what it told."""
        first = self.prefill.hand(prompt, Handoff(id=f"pull-{next(_ids)}"), **params)
        report = (await self.prefill.outputs(first))[0].handoff
        assert report is not None
        return await self.decode.outputs(
            self.decode.hand(prompt, Handoff(id=report.id, host=report.host, port=report.port), **params)
        )

    @property
    def layout(self) -> Any:
        assert self.decode.engine.handoffs is not None
        return self.decode.engine.handoffs.exchange.layout  # type: ignore[attr-defined]


@asynccontextmanager
async def pair(
    model: Harness,
    other: Harness | None = None,
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    **both: Any,
) -> AsyncIterator[Pair]:
    """Two engines with the same weights; afterwards both must be idle with nothing leaked. other: the decode engine's own copy
    of the model, where passes leave something in it (EAGLE-3's taps)."""
    common = {"plugins.kv_layerwise.key": KEY, **both}
    async with side(model, **{**common, **PREFILL, **(prefill or {})}) as first:
        peers = [f"127.0.0.1:{first.port}"]
        async with side(
            other or model, **{**common, **DECODE, "plugins.kv_layerwise.peers": peers, **(decode or {})}
        ) as second:
            yield Pair(first, second)


@asynccontextmanager
async def side(model: Harness, **overrides: Any) -> AsyncIterator[Side]:
    async with model.engine(**overrides) as running:
        await asyncio.sleep(0.01)  # the loop's first turn opens the door
        yield Side(running.engine)
