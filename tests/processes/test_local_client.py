"""The in-process client with a real engine: in one loop with it, and across threads."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, asynccontextmanager

import pytest

from fluentllm.core.errors import ContextTooLong, EngineDied, EngineUnavailable, InvalidRequest
from fluentllm.core.types import Request, SamplingParams
from fluentllm.frontend.client import LocalEngineClient

from .tiny_engine import build


@asynccontextmanager
async def in_this_loop(folder):
    engine, _ = build(folder)
    running = asyncio.create_task(engine.run())
    yield engine, LocalEngineClient(engine)
    engine.stop()
    await running


@asynccontextmanager
async def in_a_thread(folder):
    engine, _ = build(folder)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(engine.run()))
    thread.start()
    yield engine, LocalEngineClient(engine, loop)
    loop.call_soon_threadsafe(engine.stop)
    await asyncio.to_thread(thread.join)
    loop.close()


both = pytest.mark.parametrize("where", [in_this_loop, in_a_thread])


def request(id="r", max_tokens=5, prompt=(5, 6, 7)):
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(id=id, prompt=list(prompt), params=params)


async def tokens_of(client, request):
    async with asyncio.timeout(30):
        return [token async for output in client.submit(request) for token in output.tokens]


async def until_idle(client):
    async with asyncio.timeout(10):
        while (stats := await client.stats()).running or stats.waiting or stats.pages_leased:
            await asyncio.sleep(0.005)
    return stats


@both
async def test_requests_run_side_by_side(tiny, where):
    async with where(tiny) as (engine, client):
        assert (client.state, client.info) == ("ready", engine.info)
        alone = await tokens_of(client, request())
        together = await asyncio.gather(*(tokens_of(client, request(str(i))) for i in range(5)))
        assert len(alone) == 5
        assert together == [alone] * 5
        assert (await client.stats()).generated_tokens == 30
        await client.clear_cache()
        assert (await client.stats()).pages_cached == 0


@both
async def test_leaving_early_frees_the_request(tiny, where):
    async with where(tiny) as (_, client):
        async with aclosing(client.submit(request(max_tokens=5000))) as stream:
            assert (await anext(stream)).tokens
        stats = await until_idle(client)
        assert stats.generated_tokens < 5000


@both
async def test_refusals_are_raised(tiny, where):
    async with where(tiny) as (_, client):
        with pytest.raises(ContextTooLong, match="8192"):
            await tokens_of(client, request(max_tokens=9000))
        with pytest.raises(InvalidRequest, match="empty"):
            await tokens_of(client, request(prompt=()))
        assert await tokens_of(client, request())


@both
async def test_an_engine_that_ended_says_so(tiny, where):
    async with where(tiny) as (_, client):
        waiting = asyncio.create_task(tokens_of(client, request(max_tokens=8000)))
        await asyncio.sleep(0.05)
        client.stopped("the test said so")
        with pytest.raises(EngineDied, match="the test said so"):
            await waiting
        assert client.state == "failed"
        with pytest.raises(EngineUnavailable):
            await tokens_of(client, request())
        client.close()
