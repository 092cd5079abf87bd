"""A real engine on a tiny random Llama, driven from a test's own event loop."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fluentllm.assembly import LoadedModel, assemble, load_model
from fluentllm.core import config
from fluentllm.core.engine import Engine
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.plugins import PluginManager
from fluentllm.core.types import FromEngine, Outputs, Request, RequestOutput, SamplingParams
from fluentllm.hub import resolve

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def write_tiny_llama(folder: Path, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with a config.json, for `load_format: dummy`; of another model with `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**(base or TINY_LLAMA), **changes}))
    return folder


class Harness:
    """One model, engines with any settings around it."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        self.files = resolve(str(folder))
        self.overrides = {"model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1, **overrides}
        self.plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[])
        self.loaded: LoadedModel = load_model(self.settings(), self.files, self.plugins)

    def settings(self, **overrides: Any) -> Any:
        return config.load(None, {**self.overrides, **overrides}, {}).settings

    def page_bytes(self, page_size: int) -> int:
        return KVPool.bytes_per_page(self.loaded.model.spec.kv, page_size, self.loaded.dtype)

    @asynccontextmanager
    async def engine(self, *, plugins: PluginManager | None = None, **overrides: Any) -> AsyncIterator[Running]:
        """A running engine; afterwards it must be idle with nothing leaked."""
        engine = assemble(self.settings(**overrides), "tiny", self.loaded, plugins or self.plugins)
        task = asyncio.create_task(engine.run())
        running = Running(engine)
        try:
            yield running
            running.connection.close()
            while engine.has_work and not task.done():
                await asyncio.sleep(0.002)
            if not task.done():
                engine.kv.check_idle()
                engine.kv.check()
                engine.clear_cache()
                assert engine.kv.pages_free == engine.kv.pages_total
        finally:
            engine.stop()
            await task


class Running:
    """An engine and one connection to it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.connection = engine.connect(self._deliver)
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._ids = itertools.count()

    def _deliver(self, message: FromEngine) -> None:
        assert isinstance(message, Outputs)
        for output in message.outputs:
            self._queues[output.id].put_nowait(output)

    def submit(self, prompt: list[int], *, priority: int = 0, **params: Any) -> str:
        request_id = str(next(self._ids))
        self._queues[request_id] = asyncio.Queue()
        settings = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params})
        self.connection.submit(Request(id=request_id, prompt=prompt, params=settings, priority=priority))
        return request_id

    async def outputs(self, request_id: str) -> list[RequestOutput]:
        """All outputs of a request, to its end."""
        found: list[RequestOutput] = []
        while not found or found[-1].finish_reason is None:
            found.append(await self.first(request_id))
        return found

    async def first(self, request_id: str) -> RequestOutput:
        """The next output of a request. `TimeoutError` if no request gets any token for a minute: one may well wait longer for
        the others on a machine that is busy. By the second, so that a process that was stopped meanwhile loses one of them."""
        idle, before = 0, -1
        while True:
            try:
                return await asyncio.wait_for(self._queues[request_id].get(), 1)
            except TimeoutError:
                now = self.engine.stats().generated_tokens
                idle, before = (0 if now != before else idle + 1), now
                if idle == 60:
                    raise

    async def tokens(self, prompt: list[int], **params: Any) -> list[int]:
        return await self.rest(self.submit(prompt, **params))

    async def rest(self, request_id: str) -> list[int]:
        return [token for output in await self.outputs(request_id) for token in output.tokens]
