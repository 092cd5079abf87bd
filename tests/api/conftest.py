"""Servers for the API's tests: uvicorn on a real socket, in the test's own loop, with a real engine or with the test double.

`real` serves a tiny random Llama, text by a tokenizer trained on the spot. `echo` serves the double of
`frontend/echo_engine.py`, for tests of the protocol alone: what exactly is answered, and what happens when an engine fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from frontend.checkpoints import write_chat_folder
from frontend.echo_engine import EchoEngine, model_info

from fluentllm.core import config
from fluentllm.core.engine import Engine
from fluentllm.core.plugins import PluginManager
from fluentllm.core.settings import Settings
from fluentllm.frontend.app import create_app
from fluentllm.frontend.client import EngineClient, LocalEngineClient
from fluentllm.frontend.http import HttpProtocol
from fluentllm.frontend.services import Services

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


@dataclass
class Api:
    """A server and a client of it."""

    url: str
    http: httpx.AsyncClient
    services: Services
    server: uvicorn.Server
    engine: Any
    """`Engine` or `EchoEngine`."""

    async def chat(self, content: str = "Hi", **fields: Any) -> dict[str, Any]:
        return await self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **fields)

    async def complete(self, prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
        return await self.post("/v1/completions", prompt=prompt, **fields)

    async def post(self, path: str, **fields: Any) -> dict[str, Any]:
        response = await self.http.post(path, json=fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def events(self, path: str, **fields: Any) -> list[Any]:
        """Every event of a stream, decoded; the last must be `[DONE]`."""
        lines = []
        async with self.http.stream("POST", path, json={**fields, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for line in response.aiter_lines():
                if line:
                    assert line.startswith("data: ")
                    lines.append(line.removeprefix("data: "))
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    async def error(self, path: str, *, status: int, **fields: Any) -> dict[str, Any]:
        response = await self.http.post(path, json=fields)
        return error_of(response, status)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@contextlib.asynccontextmanager
async def serving(services: Services, engine: Any) -> AsyncIterator[Api]:
    """uvicorn as the front-end process runs it, on a free port."""
    plugins = PluginManager.load({"frontend"}, allow=[])
    app = create_app(services, plugins.routes())
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=HttpProtocol, ws="none", lifespan="off", access_log=False, log_config=None, server_header=False
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    with socket.create_server(("127.0.0.1", 0)) as public:
        url = f"http://127.0.0.1:{public.getsockname()[1]}"
        running = asyncio.create_task(server.serve(sockets=[public]))
        while not server.started:
            await asyncio.sleep(0.005)
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            yield Api(url, http, services, server, engine)
        server.should_exit = True
        await running
    services.close()


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without weights: config, tokenizer, chat template."""
    folder = write_chat_folder(tmp_path_factory.mktemp("model"))
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def settings_of(folder: Path, overrides: Iterable[tuple[str, Any]] = ()) -> Settings:
    given = {
        "model.name": str(folder),
        "model.served_name": "tiny",
        "model.load_format": "dummy",
        "engine.device": "cpu",
        "engine.threads": 1,
        **dict(overrides),
    }
    return config.load(None, given, {}).settings


def load_services(settings: Settings, client: EngineClient, folder: Path) -> Services:
    formats = PluginManager.load({"frontend"}, allow=[]).registry("answer_formats")
    return Services.load(settings, client, folder, "tiny", formats)


@contextlib.asynccontextmanager
async def serving_real(folder: Path, **overrides: Any) -> AsyncIterator[Api]:
    """With a real engine in this loop; afterwards it must be idle with no page held."""
    from fluentllm.assembly import build_engine
    from fluentllm.hub import resolve

    settings = settings_of(folder, overrides.items())
    engine: Engine = build_engine(settings, resolve(str(folder)), PluginManager.load({"engine", "executor"}, allow=[]))
    running = asyncio.create_task(engine.run())
    client: EngineClient = LocalEngineClient(engine)
    async with serving(load_services(settings, client, folder), engine) as api:
        yield api
        await idle(engine)
        engine.kv.check_idle()
        engine.clear_cache()
        assert engine.kv.pages_free == engine.kv.pages_total
    client.close()  # type: ignore[attr-defined]
    engine.stop()
    await running


async def idle(engine: Engine) -> None:
    async with asyncio.timeout(10):
        while engine.has_work:
            await asyncio.sleep(0.002)


@contextlib.contextmanager
def nothing_left(api: Api) -> Iterator[None]:
    """Counts tasks, descriptors and pages before and after."""

    def count() -> tuple[int, int, int]:
        gc.collect()
        return len(asyncio.all_tasks()), psutil.Process().num_fds(), api.engine.stats().pages_leased

    before = count()
    yield
    assert count() == before


async def connection_count_settles(api: Api, expected: int = 0) -> None:
    async with asyncio.timeout(10):
        while len(api.server.server_state.connections) > expected or api.server.server_state.tasks:
            await asyncio.sleep(0.005)


@pytest.fixture
async def real(chat_folder: Path) -> AsyncIterator[Api]:
    async with serving_real(chat_folder) as api:
        yield api


@contextlib.asynccontextmanager
async def serving_echo(folder: Path, *, answer_format: str = "auto", context: int = 256, **server: Any) -> AsyncIterator[Api]:
    """Answers "Paris is the capital of France." unless a test changes `engine.reply`. `server`: settings of that name."""
    given = {f"server.{name}": value for name, value in server.items()}
    settings = settings_of(folder, {**given, "model.answer_format": answer_format}.items())
    engine = EchoEngine(None, eos=2)
    services = load_services(settings, engine, folder)
    engine.info = model_info(services.tokenizer.vocab_size, context, eos=(2,))
    engine.state = "ready"
    engine.reply = services.tokenizer.encode("Paris is the capital of France.")
    async with serving(services, engine) as api:
        yield api


@pytest.fixture
async def echo(chat_folder: Path) -> AsyncIterator[Api]:
    async with serving_echo(chat_folder) as api:
        yield api
