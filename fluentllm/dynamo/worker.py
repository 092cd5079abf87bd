"""The worker: Dynamo's runtime on this thread, the engine's loop on another. Imports Dynamo (tried with 1.6.1)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.health_check import build_health_check_payload, is_probe
from dynamo.common.backend.run import run as run_worker
from dynamo.common.constants import DisaggregationMode
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument

from ..core.errors import EngineDied, EngineUnavailable, InvalidRequest
from ..frontend.generation import Usage
from ..local import LocalEngine
from ..plugins.metrics_prometheus import CALL
from .requests import chunk_of, count, ended, request_of, transfer_params

if TYPE_CHECKING:
    from ..core.settings import Settings
    from ..frontend.client import LocalEngineClient

log = logging.getLogger("fluentllm.dynamo")

MODES = {
    "both": DisaggregationMode.AGGREGATED,
    "prefill": DisaggregationMode.PREFILL,
    "decode": DisaggregationMode.DECODE,
}


class FluentWorker(LLMEngine):  # type: ignore[misc]
    """One engine. `generate` runs in Dynamo's loop, many at a time."""

    def __init__(self, settings: Settings, *, pull: bool) -> None:
        self._settings, self._pull = settings, pull
        self._role = settings.disaggregation.role
        self._local: LocalEngine | None = None
        self._leaving: dict[str, asyncio.Event] = {}
        """Set where Dynamo aborts the request."""

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[FluentWorker, WorkerConfig]:
        """Never called: what `fluent dynamo` was given has been read when `run` hands Dynamo a factory instead. Dynamo makes no
        engine of a class that lacks it."""
        raise TypeError("A FluentWorker is made of settings, not of arguments: start it by `fluent dynamo`, or `run`.")

    async def start(self, worker_id: int) -> EngineConfig:
        self._local = local = await asyncio.to_thread(LocalEngine, self._settings)
        self._client: LocalEngineClient = local.connect()
        info = local.engine.info
        meets = info.handoff is not None and self._role == "prefill" and not self._pull
        return EngineConfig(
            model=str(local.files.path),
            served_model_name=info.name,
            llm=LlmRegistration(
                context_length=info.max_model_len,
                kv_cache_block_size=info.page_size,
                total_kv_blocks=info.kv_tokens // info.page_size,
                max_num_seqs=info.slots,
                bootstrap_host=info.handoff.host if meets and info.handoff else None,
                bootstrap_port=info.handoff.port if meets and info.handoff else None,
            ),
        )

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        assert self._local is not None
        info = self._local.engine.info
        role = "both" if is_probe(request) else self._role
        name = context.id()
        leaving = self._leaving[name] = asyncio.Event()
        try:
            asked = request_of(request, name, max_model_len=info.max_model_len, role=role)
            usage = Usage(prompt_tokens=len(asked.prompt), speculative=info.speculative)
            async with contextlib.aclosing(self._client.submit(asked)) as outputs:
                async for output in _until(leaving, outputs):
                    count(usage, output)
                    chunk = chunk_of(output, info.synthetic)
                    if output.handoff is not None and role == "prefill":
                        chunk["disaggregated_params"] = transfer_params(output.handoff, request)
                    if output.finish_reason is not None:
                        chunk |= ended(output, usage)
                    yield chunk
        except InvalidRequest as error:
            raise InvalidArgument(str(error)) from error
        except (EngineDied, EngineUnavailable) as error:  # Dynamo sends the request to another worker
            raise EngineShutdown(str(error)) from error
        finally:
            del self._leaving[name]

    async def abort(self, context: Any) -> None:
        leaving = self._leaving.get(context.id())
        if leaving is not None:
            leaving.set()

    async def register_prometheus(self, metrics: Any) -> None:
        metrics.register_prometheus_expfmt_callback(self._exposition)

    def _exposition(self) -> str:
        """The engine's figures, as `GET /metrics` of `fluent serve` has them. Called on a thread of Dynamo's."""
        local = self._local
        return "" if local is None else local.call(local.generation.client.call(CALL)).decode()

    async def is_quiescent(self) -> bool | None:
        if self._local is None or self._local.engine.handoffs is None:
            return True
        stats = await self._client.stats()
        return not stats.handoff.get("open", 0)

    async def health_check_payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = build_health_check_payload(bos_token_id=0)
        return payload

    async def cleanup(self) -> None:
        local, self._local = self._local, None
        if local is not None:
            self._client.close()
            await asyncio.to_thread(local.close)


async def _until(leaving: asyncio.Event, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The items, as long as the event is not set: who waits for a place in a batch has none that could end it."""
    left = asyncio.create_task(leaving.wait())
    try:
        while True:
            item = asyncio.ensure_future(anext(outputs))
            await asyncio.wait((item, left), return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                item.cancel()
                await asyncio.gather(item, return_exceptions=True)
                return
            try:
                yield item.result()
            except StopAsyncIteration:
                return
    finally:
        left.cancel()


def run(settings: Settings, *, namespace: str, pull: bool, discovery: str) -> None:
    """Until a signal says stop."""
    role = settings.disaggregation.role
    config = WorkerConfig(
        namespace=namespace,
        component="prefill" if role == "prefill" else "backend",
        model_name=settings.model.name,
        served_model_name=settings.model.served_name,
        discovery_backend=discovery,
        event_plane="zmq",
        disaggregation_mode=MODES[role],
    )

    async def make(argv: list[str] | None) -> tuple[FluentWorker, WorkerConfig]:
        return FluentWorker(settings, pull=pull), config

    run_worker(FluentWorker, engine_factory=partial(make))
