"""Server-sent events a second from one front-end process: our path beside FastAPI with pydantic, on the same work.

    pip install fastapi
    python benchmarks/frontend/sse.py --streams 64 --tokens 200

Both servers are uvicorn with uvloop and httptools in a process of their own, stream chat chunks of the same tokens through the
same detokenizer, and are read by the same client. A source in the server stands for the engine: it gives every stream one
token in each turn of the event loop, as an engine gives its batch one token a step. A third server, `raw`, sends constant
bytes: what uvicorn and the kernel take by themselves. Printed are chunks a second of wall clock and of the server's CPU time
(the steadier number on a shared machine), the medians of `--repeat` alternating runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import psutil

TEXT = 'The quick brown fox jumps over the lazy dog, "again" and again; né 🙂. '
MODEL = "bench"


# ----------------------------------------------------------------------------------------------------------------- servers
def tokenizer_and_info() -> tuple[Any, Any]:
    from fluentllm.core.types import KVSpec, ModelInfo, ModelSpec
    from fluentllm.frontend.tokenizer import bytes_tokenizer

    kv = KVSpec(kind="gqa", layers=1, heads=1, head_dim=8, v_head_dim=8)
    spec = ModelSpec(
        architecture="Bench", vocab_size=256, hidden_size=8, layers=1, heads=1, max_position=1 << 20, kv=kv, eos_token_ids=()
    )
    info = ModelInfo(
        name=MODEL, spec=spec, max_model_len=1 << 20, device="cpu", dtype="float32", memory={}, kv_tokens=1 << 20, page_size=16,
        slots=256,
    )  # fmt: skip
    return bytes_tokenizer(), info


class Source:
    """Stands for the engine client: one token a stream and turn of the loop."""

    state = "ready"

    def __init__(self, info: Any) -> None:
        self.info = info
        self.tokens = list(TEXT.encode())

    async def submit(self, request: Any) -> AsyncGenerator[Any, None]:
        from fluentllm.core.types import RequestOutput

        count = request.params.max_tokens
        for i in range(count):
            await asyncio.sleep(0)
            token = self.tokens[i % len(self.tokens)]
            yield RequestOutput(id=request.id, tokens=[token], finish_reason="length" if i == count - 1 else None)


def fluent_app() -> Any:
    from fluentllm.core.plugins import PluginManager
    from fluentllm.core.settings import Settings
    from fluentllm.frontend.app import create_app
    from fluentllm.frontend.services import Services
    from fluentllm.frontend.templates import ChatTemplate

    tokenizer, info = tokenizer_and_info()
    template = ChatTemplate("{{ messages[0].content }}")
    services = Services(Settings(), Source(info), tokenizer, template, MODEL)  # type: ignore[arg-type]
    return create_app(services, PluginManager.load({"frontend"}, allow=[]).routes())


def fastapi_app() -> Any:
    """What one writes first: models for request and chunk, `model_dump_json` for each event."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from pydantic import BaseModel

    from fluentllm.core.types import Request, SamplingParams
    from fluentllm.frontend.detokenizer import Detokenizer

    class Message(BaseModel):
        role: str
        content: str

    class ChatRequest(BaseModel):
        model: str
        messages: list[Message]
        max_tokens: int
        stream: bool = False
        ignore_eos: bool = False

    class Delta(BaseModel):
        role: str | None = None
        content: str | None = None

    class Choice(BaseModel):
        index: int
        delta: Delta
        logprobs: None = None
        finish_reason: str | None = None

    class Chunk(BaseModel):
        id: str
        object: str = "chat.completion.chunk"
        created: int
        model: str
        choices: list[Choice]

    app = FastAPI()
    tokenizer, info = tokenizer_and_info()
    source = Source(info)

    async def chat(body: ChatRequest) -> StreamingResponse:
        async def events() -> AsyncGenerator[str, None]:
            detokenizer = Detokenizer(tokenizer)
            request = Request(
                id="x", prompt=tokenizer.encode(body.messages[0].content), params=SamplingParams(max_tokens=body.max_tokens)
            )
            created = int(time.time())
            async for output in source.submit(request):
                text = detokenizer.push_all(output.tokens)
                if text or output.finish_reason:
                    choice = Choice(index=0, delta=Delta(content=text), finish_reason=output.finish_reason)
                    chunk = Chunk(id="chatcmpl-x", created=created, model=body.model, choices=[choice])
                    yield f"data: {chunk.model_dump_json()}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    chat.__annotations__["body"] = ChatRequest
    app.post("/v1/chat/completions", response_model=None)(chat)
    return app


def raw_app() -> Any:
    """The floor: the same source, and the same bytes each time, straight to the server."""
    from fluentllm.core.types import Request, SamplingParams

    _, info = tokenizer_and_info()
    source = Source(info)
    chunk = msgspec.json.encode(
        {"id": "x" * 41, "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [
            {"index": 0, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}]}
    )  # fmt: skip
    event = b"data: " + chunk + b"\n\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = msgspec.json.decode((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        async for _ in source.submit(Request(id="x", prompt=[1], params=SamplingParams(max_tokens=body["max_tokens"]))):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


def serve(kind: str, fd: int) -> None:
    import uvicorn

    app = {"fluent": fluent_app, "fastapi": fastapi_app, "raw": raw_app}[kind]()
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        app, http="httptools", loop="uvloop", ws="none", lifespan="off", access_log=False, log_level="warning"
    )
    with socket.socket(fileno=fd) as public:
        uvicorn.Server(config).run(sockets=[public])


# ------------------------------------------------------------------------------------------------------------------ client
def read_streams(port: int, streams: int, tokens: int) -> int:
    """Open all streams at once, read them to their end; how many events came."""
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Go on."}],
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head % len(body) + body)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        tails[connection] = b""
    events = 0
    while tails:
        for key, _ in selector.select(10):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            data = connection.recv(1 << 18)
            events += data.count(b"data: ")
            tail = tails[connection] = (tails[connection] + data)[-64:]
            if b"[DONE]" in tail or not data:
                selector.unregister(connection)
                connection.close()
                del tails[connection]
    return events - streams  # `[DONE]` is none


class Served:
    """A server process."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as public:
            self.port = public.getsockname()[1]
            fd = public.fileno()
            command = [sys.executable, __file__, "--serve", kind, "--fd", str(fd)]
            self.process = subprocess.Popen(command, pass_fds=[fd])
        self.rates: list[float] = []
        self.cpu_rates: list[float] = []

    def run(self, streams: int, tokens: int) -> None:
        times = psutil.Process(self.process.pid).cpu_times
        cpu, wall = sum(times()[:2]), time.perf_counter()
        events = read_streams(self.port, streams, tokens)
        wall, cpu = time.perf_counter() - wall, sum(times()[:2]) - cpu
        self.rates.append(events / wall)
        self.cpu_rates.append(events / cpu)

    def result(self) -> dict[str, Any]:
        return {
            "server": self.kind,
            "chunks_per_s": round(statistics.median(self.rates)),
            "chunks_per_cpu_s": round(statistics.median(self.cpu_rates)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--serve", choices=["fluent", "fastapi", "raw"], help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.fd)
        return
    kinds = ["fluent", "raw"]
    try:
        import fastapi

        kinds.append("fastapi")
    except ImportError:
        print("fastapi is not installed: nothing to compare with (pip install fastapi)")
    servers = [Served(kind) for kind in kinds]
    try:
        for server in servers:
            read_streams(server.port, given.streams, given.tokens)  # warm up
        for _ in range(given.repeat):
            for server in servers:
                server.run(given.streams, given.tokens)
    finally:
        for server in servers:
            server.process.terminate()
            server.process.wait()
    results = [server.result() for server in servers]
    report: dict[str, Any] = {
        "streams": given.streams,
        "tokens": given.tokens,
        "python": platform.python_version(),
        "servers": results,
    }
    if "fastapi" in kinds:
        ours, theirs = results[0], results[kinds.index("fastapi")]
        report["fastapi"] = fastapi.__version__
        report["ratio"] = round(ours["chunks_per_s"] / theirs["chunks_per_s"], 2)
        report["cpu_ratio"] = round(ours["chunks_per_cpu_s"] / theirs["chunks_per_cpu_s"], 2)
    print(json.dumps(report, indent=2))
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
