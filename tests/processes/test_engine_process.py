"""What the engine's process adds around an engine: outputs too large for a frame, draining."""

from __future__ import annotations

import asyncio

import pytest

from fluentllm.core import ipc
from fluentllm.core.errors import EngineDied, EngineUnavailable
from fluentllm.core.types import Outputs, Request, RequestOutput, SamplingParams
from fluentllm.frontend.client import SocketEngineClient
from fluentllm.processes.engine import Gate

from .tiny_engine import build


@pytest.fixture
async def gate(tiny, tmp_path):
    """A real engine behind its socket, which takes frames of 8 KiB at most."""
    engine, _ = build(tiny)
    gate = Gate(engine)
    gate.path = tmp_path / "e.sock"
    running = asyncio.create_task(engine.run())
    server = await ipc.serve(gate.path, gate.accept, generation=1, max_frame=8192)
    yield gate
    for client in list(gate.clients):
        client.connection.close()
    server.close()
    engine.stop()
    await running


@pytest.fixture
async def client(gate):
    client = SocketEngineClient(gate.path)
    await client.start()
    await asyncio.wait_for(client.wait_ready(), 5)
    yield client
    await client.close()


def request(id="r", length=3, **params):
    settings = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **params})
    return Request(id=id, prompt=[5] * length, params=settings)


async def collect(client, request):
    async with asyncio.timeout(30):
        return [output async for output in client.submit(request)]


async def test_a_step_too_large_for_one_frame_arrives_in_several(gate, client):
    # 10 requests with 60 prompt logprobs each: about 15 kB in one step.
    work = [request(str(i), length=60, prompt_logprobs=1) for i in range(10)]
    alone = await collect(client, work[0])
    together = await asyncio.gather(*(collect(client, item) for item in work))
    assert all(len(outputs[0].prompt_logprobs) == 60 for outputs in together)
    tokens = [[token for output in outputs for token in output.tokens] for outputs in (alone, *together)]
    assert all(other == tokens[0] for other in tokens)

    (served,) = gate.clients
    large = Outputs(outputs=[RequestOutput(id=str(i), tokens=list(range(300))) for i in range(20)])
    received = []
    client._inbox.receive = received.append
    served.deliver(large)
    while sum(len(message.outputs) for message in received) < 20:
        await asyncio.sleep(0.01)
    assert len(received) > 1
    assert [output for message in received for output in message.outputs] == large.outputs


async def test_an_output_too_large_for_any_frame_ends_its_request(client):
    with pytest.raises(ipc.FrameTooLarge):
        await collect(client, request(length=500, prompt_logprobs=20, max_tokens=1000))
    async with asyncio.timeout(10):
        while (await client.stats()).running:
            await asyncio.sleep(0.01)
    assert len(await collect(client, request())) == 5


async def test_a_draining_engine_finishes_what_runs_and_takes_nothing_new(gate, client):
    running = asyncio.create_task(collect(client, request(max_tokens=200)))
    await asyncio.sleep(0.05)
    gate.draining = True
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await collect(client, request("new"))
    assert sum(len(output.tokens) for output in await running) == 200


async def test_a_client_that_vanishes_leaves_nothing_running(gate, client):
    task = asyncio.create_task(collect(client, request(max_tokens=5000)))
    while not gate.engine.has_work:
        await asyncio.sleep(0.005)
    await client.close()
    with pytest.raises(EngineDied, match="went away"):
        await task
    async with asyncio.timeout(10):
        while gate.engine.has_work or gate.clients:
            await asyncio.sleep(0.005)
    assert gate.engine.stats().pages_leased == 0
