"""Clients that leave: the engine stops their work, and no page, task or file descriptor stays behind."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Api, connection_count_settles, idle, nothing_left, serving_echo

LONG: dict[str, Any] = {"max_tokens": 480, "ignore_eos": True}


async def ask_and_leave(api: Api, path: str, body: dict[str, Any], chunks: int) -> None:
    """Send a request, read some pieces of the answer, close the connection."""
    url = httpx.URL(api.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    content = json.dumps(body).encode()
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(content)) + content)
    for _ in range(chunks):
        await reader.readuntil(b"\n\n")
    if not chunks:
        async with asyncio.timeout(10):
            while not api.engine.has_work:
                await asyncio.sleep(0.001)
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": True, "n": 4}, {}, {"n": 4}], ids=str)
async def test_leaving_stops_the_work(real: Api, fields: dict[str, Any]) -> None:
    await real.complete(max_tokens=1)
    await real.http.aclose()
    await connection_count_settles(real)
    body = {"messages": [{"role": "user", "content": "Hi"}], **LONG, **fields}
    with nothing_left(real):
        before = real.engine.stats().generated_tokens
        await ask_and_leave(real, "/v1/chat/completions", body, chunks=3 if "stream" in fields else 0)
        await connection_count_settles(real)
        await idle(real.engine)
        assert real.engine.stats().generated_tokens - before < LONG["max_tokens"] * fields.get("n", 1)


async def test_leaving_before_the_body_is_sent(real: Api, caplog: pytest.LogCaptureFixture) -> None:
    await real.complete(max_tokens=1)
    await real.http.aclose()
    await connection_count_settles(real)
    url = httpx.URL(real.url)
    with nothing_left(real):
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"prompt": "x')
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        await connection_count_settles(real)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_half_a_body_is_not_waited_for_for_ever(chat_folder: Path) -> None:
    async with serving_echo(chat_folder, body_timeout=0.2) as api:
        url = httpx.URL(api.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"prompt": "x')
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: ([0-9]+)", head)[1])  # type: ignore[index]
            error = json.loads(await reader.readexactly(length))["error"]
        assert head.startswith(b"HTTP/1.1 408 ")
        assert error["code"] == "body_timeout"
        assert "13 bytes" in error["message"]
        assert "server.body_timeout" in error["message"]
        writer.close()
        await writer.wait_closed()
        await connection_count_settles(api)
        # A whole body may wait for its answer as long as it takes.
        async with asyncio.timeout(20):
            api.engine.pause = 0.1
            assert (await api.complete("still there"))["choices"]


async def test_a_crowd_that_leaves(real: Api) -> None:
    await real.complete(max_tokens=1)
    await real.http.aclose()
    await connection_count_settles(real)
    bodies = [{"prompt": f"Number {i}", **LONG, "stream": i % 2 == 0} for i in range(12)]
    with nothing_left(real):
        await asyncio.gather(
            *(
                ask_and_leave(real, "/v1/completions", body, chunks=i % 3 if body["stream"] else 0)
                for i, body in enumerate(bodies)
            )
        )
        await connection_count_settles(real)
        await idle(real.engine)
    assert real.engine.stats().running == real.engine.stats().waiting == 0


async def test_a_slow_reader_gets_everything(echo: Api) -> None:
    """Backpressure: the stream waits for its client, other clients do not."""
    echo.engine.reply = echo.services.tokenizer.encode("again and ")
    url = httpx.URL(echo.url)
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=4096)
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await asyncio.sleep(0.05)
    assert (await echo.complete("other"))["choices"][0]["text"] == "again and "
    received = b""
    while b"[DONE]" not in received:
        received += await reader.read(2048)
    assert received.count(b'"finish_reason":null') == 199
    writer.close()
    await writer.wait_closed()
