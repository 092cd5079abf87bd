"""Plugin: `GET /metrics` in Prometheus' text format.

Loaded in two processes: the engine's half observes steps and requests and answers the call `CALL` with its figures as text;
the front end's route asks for them and puts its own before them. Each half has a registry of its own, so nothing is shared
with other users of `prometheus_client` in the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import RegisterCall, RegisterRoute, RequestEvent
    from fluentllm.core.types import StepPlan, StepResult

    from .requests import Latencies

FLUENT_API_VERSION = 1
CALL = "metrics_prometheus"


class MetricsPlugin:
    def __init__(self) -> None:
        self._latencies: Latencies | None = None

    @property
    def latencies(self) -> Latencies:
        if self._latencies is None:
            from .requests import Latencies

            self._latencies = Latencies()
        return self._latencies

    @hookimpl
    def fluent_request(self, event: RequestEvent) -> None:
        self.latencies.request(event)

    @hookimpl
    def fluent_step(self, plan: StepPlan, result: StepResult) -> None:
        self.latencies.step(result)

    @hookimpl
    def fluent_calls(self, register: RegisterCall) -> None:
        # What was observed before belongs to another engine of this process (`LLM` twice in a notebook).
        self._latencies = None
        register(CALL, self._scrape)

    def _scrape(self, engine: Any, data: bytes) -> bytes:
        from .engine import scrape

        return scrape(engine, self.latencies)

    @hookimpl
    def fluent_routes(self, register: RegisterRoute) -> None:
        from .route import metrics

        register("/metrics", metrics, summary="Figures of the server, for Prometheus")


plugin = MetricsPlugin()
