"""Frames between the front end and the engine, over real Unix sockets."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import pytest
import uvloop

from fluentllm.core import ipc
from fluentllm.core.errors import ConfigError
from fluentllm.core.types import Abort, ControlCall, Generate, Outputs, Request, RequestOutput, SamplingParams, encode

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture:DeprecationWarning")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request):
    return request.param()


class Box:
    """A peer that keeps what it gets."""

    def __init__(self):
        self.messages = []
        self.connection = None
        self.reason = None
        self.changed = asyncio.Event()

    def accept(self, connection):
        self.connection = connection
        self.changed.set()
        return self

    def received(self, message):
        self.messages.append(message)
        self.changed.set()

    def lost(self, reason):
        self.reason = reason
        self.changed.set()

    async def until(self, condition, timeout=5):
        async with asyncio.timeout(timeout):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def engine(tmp_path):
    """The engine's side of one connection, generation 3."""
    box = Box()
    box.path = tmp_path / "e.sock"
    server = await ipc.serve(box.path, box.accept, generation=3, max_frame=1 << 20, stall_timeout=0.3)
    yield box
    server.close()
    if box.connection is not None:
        box.connection.close()


async def client_of(engine, **options):
    box = Box()
    box.connection = await ipc.connect(engine.path, box.accept, **options)
    return box


def frame(message, generation=3):
    payload = encode(message)
    return ipc.HEADER.pack(len(payload), generation) + payload


def some_request(random, id="r", length=None):
    prompt = [random.randrange(1 << 17) for _ in range(random.randrange(2000) if length is None else length)]
    return Request(id=id, prompt=prompt, params=SamplingParams(max_tokens=3, logit_bias={7: -1.5}, stop_token_ids=(1, 2)))


async def test_messages_cross_in_order_and_unchanged(engine):
    rng = random.Random()
    client = await client_of(engine)
    await engine.until(lambda box: box.connection)

    def output(i):
        return RequestOutput(id=str(i), tokens=[rng.randrange(100) for _ in range(rng.randrange(4))])

    outputs = [Outputs(outputs=[output(i) for i in range(n)]) for n in (0, 1, 256)]
    for message in outputs:
        engine.connection.send(message)
    await client.until(lambda box: len(box.messages) == 3)
    assert client.messages == outputs
    assert client.connection.generation == 3

    requests = [Generate(request=some_request(rng, str(i))) for i in range(20)]
    for message in requests:
        client.connection.send(message)
    client.connection.send(ControlCall(id=5, method="stats"))
    await engine.until(lambda box: len(box.messages) == 21)
    assert engine.messages == [*requests, ControlCall(id=5, method="stats")]


async def test_frames_survive_any_fragmentation(engine):
    rng = random.Random()
    messages = [Generate(request=some_request(rng, str(i))) for i in range(10)] + [Abort(ids=[])]
    stream = b"".join(map(frame, messages))
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(engine.path))
    raw.setblocking(False)
    at = 0
    while at < len(stream):
        size = rng.choice((1, 2, 7, 100, 5000))
        await asyncio.get_running_loop().sock_sendall(raw, stream[at : at + size])
        at += size
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    await engine.until(lambda box: len(box.messages) == len(messages))
    assert engine.messages == messages
    raw.close()


async def test_many_small_sends_leave_in_one_write(engine, monkeypatch):
    client = await client_of(engine)
    await engine.until(lambda box: box.connection)
    engine.connection.send(Outputs(outputs=[]))
    await client.until(lambda box: box.messages)
    writes = []
    transport = client.connection._transport

    class Counting:
        def __getattr__(self, name):
            return getattr(transport, name)

        def write(self, data):
            writes.append(len(data))
            transport.write(data)

    client.connection._transport = Counting()
    for _ in range(200):
        client.connection.send(Abort(ids=["a"]))
    await engine.until(lambda box: len(box.messages) == 200)
    assert len(writes) == 1


async def test_frames_of_another_generation_are_dropped(engine):
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(engine.path))
    raw.sendall(frame(Abort(ids=["old"]), 2) + frame(Abort(ids=["now"]), 3) + frame(Abort(ids=["odd"]), 4))
    raw.close()
    await engine.until(lambda box: box.reason)
    assert [message.ids for message in engine.messages] == [["now"]]
    assert engine.connection.stale == 2


async def test_a_client_takes_no_frame_of_an_engine_older_than_it_knows(engine):
    client = await client_of(engine, oldest=4)
    await engine.until(lambda box: box.connection)
    engine.connection.send(Outputs(outputs=[]))
    engine.connection.close()
    await client.until(lambda box: box.reason)
    assert client.messages == []
    assert client.connection.stale == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (ipc.HEADER.pack(1 << 30, 3), "1,073,741,824 bytes is announced"),
        (ipc.HEADER.pack(3, 3) + b"\xc1\xc1\xc1", "could not be decoded"),
        (ipc.HEADER.pack(1, 3) + b"\xc0", "could not be decoded"),
        (frame(Outputs(outputs=[])), "could not be decoded"),
    ],
)
async def test_a_peer_that_breaks_the_format_is_disconnected(engine, data, reason):
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(engine.path))
    raw.sendall(data + frame(Abort(ids=["after"])))
    await engine.until(lambda box: box.reason)
    assert reason in engine.reason
    assert engine.messages == []
    raw.close()


async def test_a_message_too_large_is_refused_before_it_is_sent(engine):
    client = await client_of(engine)
    await engine.until(lambda box: box.connection)
    engine.connection.send(Outputs(outputs=[RequestOutput(id="before")]))
    with pytest.raises(ipc.FrameTooLarge, match="Outputs message"):
        engine.connection.send(Outputs(outputs=[RequestOutput(id="x" * (1 << 20))]))
    engine.connection.send(Outputs(outputs=[RequestOutput(id="after")]))
    await client.until(lambda box: len(box.messages) == 2)
    assert [message.outputs[0].id for message in client.messages] == ["before", "after"]


async def test_a_peer_that_does_not_read_is_disconnected(engine):
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(engine.path))
    await engine.until(lambda box: box.connection)
    message = Outputs(outputs=[RequestOutput(id="r", tokens=list(range(100_000)))])
    for _ in range(10):
        engine.connection.send(message)
    assert engine.connection.open
    await engine.until(lambda box: box.reason)
    assert "has not read for 0.3 seconds" in engine.reason
    assert not engine.connection.open
    engine.connection.send(message)  # swallowed
    raw.close()


async def test_a_peer_that_reads_slowly_but_steadily_is_kept(engine):
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(engine.path))
    await engine.until(lambda box: box.connection)
    message = Outputs(outputs=[RequestOutput(id="r", tokens=list(range(100_000)))])
    for _ in range(10):
        engine.connection.send(message)
    for _ in range(9):  # three times the stall timeout
        await asyncio.sleep(0.1)
        raw.recv(1 << 18)  # a socket holds less; it takes more only once most of that is read
    assert engine.connection.open
    raw.close()
    await engine.until(lambda box: box.reason)


async def test_a_late_look_blames_nobody(engine):
    """The loop stood still for longer than the stall timeout, so nothing could leave."""
    client = await client_of(engine)
    await engine.until(lambda box: box.connection)
    message = Outputs(outputs=[RequestOutput(id="r", tokens=list(range(100_000)))])
    for _ in range(10):
        engine.connection.send(message)
    engine.connection.flush()
    time.sleep(0.5)
    await client.until(lambda box: len(box.messages) == 10)
    assert engine.connection.open


async def test_what_waits_for_a_peer_is_bounded_in_bytes_too(tmp_path):
    box = Box()
    server = await ipc.serve(tmp_path / "e.sock", box.accept, generation=1, max_unsent=1 << 20)
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(tmp_path / "e.sock"))
    await box.until(lambda box: box.connection)
    message = Outputs(outputs=[RequestOutput(id="r", tokens=list(range(100_000)))])
    for _ in range(10):
        box.connection.send(message)
    await box.until(lambda box: box.reason)
    assert "does not read" in box.reason
    raw.close()
    server.close()


async def test_a_slow_reader_gets_everything(engine):
    client = await client_of(engine)
    await engine.until(lambda box: box.connection)
    client.connection._transport.pause_reading()
    message = Outputs(outputs=[RequestOutput(id="r", tokens=list(range(100_000)))])
    for _ in range(10):
        engine.connection.send(message)
    await asyncio.sleep(0.1)
    client.connection._transport.resume_reading()
    await client.until(lambda box: len(box.messages) == 10)
    await asyncio.sleep(0.4)  # longer than the stall timeout, which must have been called off
    assert engine.connection.open


async def test_closing_sends_what_is_queued_first(engine):
    client = await client_of(engine)
    await engine.until(lambda box: box.connection)
    engine.connection.send(Outputs(outputs=[]))
    engine.connection.close()
    await client.until(lambda box: box.reason)
    assert client.messages == [Outputs(outputs=[])]


async def test_a_path_too_long_for_a_socket_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="TMPDIR"):
        await ipc.serve(tmp_path / ("x" * 100), lambda connection: None, generation=1)
