"""The socket client, with the test playing the engine at the other end of a real socket."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from fluentllm.core import ipc
from fluentllm.core.errors import ContextTooLong, EngineDied, EngineUnavailable, FluentError, InvalidRequest, QueueFull
from fluentllm.core.session import refusal
from fluentllm.core.types import (
    Abort,
    ControlCall,
    ControlReply,
    EngineStats,
    Generate,
    KVSpec,
    ModelInfo,
    ModelSpec,
    Outputs,
    Ready,
    Request,
    RequestOutput,
    SamplingParams,
)
from fluentllm.frontend.client import SocketEngineClient
from fluentllm.frontend.inbox import error_of

INFO = ModelInfo(
    name="played",
    spec=ModelSpec(
        architecture="Played",
        vocab_size=100,
        hidden_size=8,
        layers=1,
        heads=1,
        max_position=64,
        kv=KVSpec(kind="gqa", layers=1, heads=1, head_dim=8, v_head_dim=8),
    ),
    max_model_len=64,
    device="cpu",
    dtype="float32",
    memory={},
    kv_tokens=64,
    page_size=16,
    slots=4,
)
STATS = EngineStats(
    waiting=1,
    running=2,
    pages_total=3,
    pages_free=3,
    pages_cached=0,
    pages_leased=0,
    steps=9,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    preemptions=0,
)


def request(id="r", **params):
    return Request(id=id, prompt=[1, 2, 3], params=SamplingParams(max_tokens=8, **params))


def outputs(*given):
    return Outputs(outputs=[RequestOutput(id=id, tokens=tokens, finish_reason=reason) for id, tokens, reason in given])


class PlayedEngine:
    """Says what the test tells it to say."""

    def __init__(self, path):
        self.path = path
        self.messages = asyncio.Queue()
        self.connection = None
        self._server = None

    async def start(self, generation=1):
        self._server = await ipc.serve(self.path, self._accept, generation=generation)

    def stop(self):
        """As a crash does: nobody listens, and the connection breaks off."""
        if self._server is not None:
            self._server.close()
        if self.connection is not None:
            self.connection.close()

    def _accept(self, connection):
        self.connection = connection
        connection.send(Ready(info=INFO))
        return self

    def received(self, message):
        self.messages.put_nowait(message)

    def lost(self, reason):
        self.connection = None

    def say(self, message):
        self.connection.send(message)

    async def next(self):
        return await asyncio.wait_for(self.messages.get(), 5)


@pytest.fixture
async def engine(tmp_path):
    engine = PlayedEngine(tmp_path / "e.sock")
    yield engine
    engine.stop()


@pytest.fixture
async def client(engine):
    client = SocketEngineClient(engine.path)
    await client.start()
    yield client
    await client.close()


@pytest.fixture
async def ready(engine, client):
    await engine.start()
    await asyncio.wait_for(client.wait_ready(), 5)
    return client


async def collect(client, request):
    async with asyncio.timeout(10):
        return [output.tokens async for output in client.submit(request)]


async def test_requests_stream_side_by_side(engine, ready):
    running = [asyncio.create_task(collect(ready, request(id))) for id in "ab"]
    assert {(await engine.next()).request.id, (await engine.next()).request.id} == {"a", "b"}
    engine.say(outputs(("a", [1], None), ("b", [7, 8], None)))
    engine.say(outputs(("b", [9], "length")))
    engine.say(outputs(("a", [2, 3], "stop"), ("b", [0], None)))  # nobody asked for more of b
    assert await asyncio.gather(*running) == [[[1], [2, 3]], [[7, 8], [9]]]
    assert engine.messages.empty(), "a request that finished is not aborted"


async def test_leaving_early_aborts(engine, ready):
    async with aclosing(ready.submit(request())) as stream:
        first = asyncio.ensure_future(anext(stream))
        assert isinstance(await engine.next(), Generate)
        engine.say(outputs(("r", [1], None)))
        assert (await first).tokens == [1]
    assert await engine.next() == Abort(ids=["r"])


async def test_a_complete_request_is_stopped_and_not_aborted(engine, ready):
    async with aclosing(ready.submit(request())) as stream:
        first = asyncio.ensure_future(anext(stream))
        assert isinstance(await engine.next(), Generate)
        engine.say(outputs(("r", [1], None)))
        await first
        ready.complete("r")
        ready.complete("r")
        ready.complete("unknown")
    assert await engine.next() == Abort(ids=["r"], reason="stop")
    assert engine.messages.empty()


async def test_a_cancelled_reader_aborts(engine, ready):
    task = asyncio.create_task(collect(ready, request()))
    assert isinstance(await engine.next(), Generate)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await engine.next() == Abort(ids=["r"])
    again = asyncio.create_task(collect(ready, request()))
    await engine.next()
    engine.say(outputs(("r", [5], "stop")))
    assert await again == [[5]]


@pytest.mark.parametrize("error", [QueueFull("full"), ContextTooLong("long", param="prompt"), InvalidRequest("no", fix="Do.")])
async def test_a_refusal_comes_out_as_the_error_it_was(engine, ready, error):
    task = asyncio.create_task(collect(ready, request()))
    await engine.next()
    engine.say(refusal("r", error))
    with pytest.raises(type(error)) as caught:
        await task
    assert str(caught.value) == str(error)
    assert caught.value.param == error.param
    assert engine.messages.empty()


def test_an_unknown_code_keeps_its_status():
    class PluginsOwnError(FluentError):
        status, code = 418, "teapot"

    refused = refusal("r", PluginsOwnError("short and stout"))
    del PluginsOwnError
    error = error_of(refused)
    assert (error.status, error.code, error.message) == (418, "teapot", "short and stout")
    assert FluentError.status == 500


async def test_before_the_engine_is_there_requests_are_refused_at_once(client):
    assert (client.state, client.info) == ("starting", None)
    with pytest.raises(EngineUnavailable, match="starting"):
        await collect(client, request())
    with pytest.raises(EngineUnavailable):
        await client.stats()


async def test_a_crash_ends_what_runs_and_the_next_engine_is_found(engine, ready):
    tasks = [asyncio.create_task(collect(ready, request(id))) for id in "ab"]
    stats = asyncio.create_task(ready.stats())
    for _ in range(3):
        await engine.next()
    engine.say(outputs(("a", [1], None)))
    engine.stop()
    for task in [*tasks, stats]:
        with pytest.raises(EngineDied):
            await task
    assert (ready.state, ready.info) == ("restarting", INFO)
    with pytest.raises(EngineUnavailable, match="restarting"):
        await collect(ready, request())

    await engine.start(generation=2)
    await asyncio.wait_for(ready.wait_ready(), 5)
    assert ready.state == "ready"
    task = asyncio.create_task(collect(ready, request()))
    await engine.next()
    engine.say(outputs(("r", [5], "stop")))
    assert await task == [[5]]


async def test_an_engine_older_than_the_last_one_is_not_believed(engine, ready):
    engine.stop()
    await asyncio.sleep(0)
    await engine.start(generation=0)
    await asyncio.sleep(0.3)
    assert ready.state == "restarting"


async def test_what_the_supervisor_tells_counts_while_there_is_no_connection(engine, client):
    client.told("failed")
    assert client.state == "failed"
    await engine.start()
    await asyncio.wait_for(client.wait_ready(), 5)
    assert client.state == "ready"
    client.told("ready")
    engine.stop()
    while client.state == "ready":
        await asyncio.sleep(0.01)
    assert client.state == "restarting"


async def test_control_calls(engine, ready):
    stats = asyncio.create_task(ready.stats())
    clear = asyncio.create_task(ready.clear_cache())
    calls = [await engine.next(), await engine.next()]
    assert [call.method for call in calls] == ["stats", "clear_cache"]
    for call in reversed(calls):
        assert isinstance(call, ControlCall)
        engine.say(ControlReply(id=call.id, stats=STATS))
    assert await stats == STATS
    await clear


async def test_one_id_cannot_run_twice(engine, ready):
    task = asyncio.create_task(collect(ready, request()))
    await engine.next()
    with pytest.raises(InvalidRequest, match="'r'"):
        await collect(ready, request())
    engine.say(outputs(("r", [5], "stop")))
    assert await task == [[5]]


async def test_a_prompt_too_large_for_a_frame_is_refused(engine, tmp_path):
    await engine.start()
    client = SocketEngineClient(engine.path, max_frame=4096)
    await client.start()
    await asyncio.wait_for(client.wait_ready(), 5)
    large = Request(id="r", prompt=list(range(5000)), params=SamplingParams(max_tokens=1))
    with pytest.raises(ipc.FrameTooLarge):
        await collect(client, large)
    task = asyncio.create_task(collect(client, request()))
    assert (await engine.next()).request.prompt == [1, 2, 3]
    engine.say(outputs(("r", [5], "stop")))
    assert await task == [[5]]
    await client.close()
