"""The front end's half: the route, and what this process itself can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import Response

from fluentllm import __version__
from fluentllm.core.errors import EngineDied, EngineUnavailable, PluginError

from . import CALL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric
    from starlette.requests import Request

    from fluentllm.frontend.services import Services


async def metrics(request: Request) -> Response:
    """Answers also while the engine is away: then `fluent_engine_up` is 0 and the engine's figures are missing."""
    services: Services = request.app.state.fluent
    engine = b""
    if services.client.state == "ready":
        try:
            engine = await services.client.call(CALL)
        except (EngineUnavailable, EngineDied, PluginError):
            engine = b""
    registry = CollectorRegistry()
    registry.register(FrontEndCollector(services, up=bool(engine)))
    return Response(generate_latest(registry) + engine, media_type=None, headers={"content-type": CONTENT_TYPE_LATEST})


class FrontEndCollector(Collector):
    def __init__(self, services: Services, *, up: bool) -> None:
        self._services = services
        self._up = up

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("fluent_engine_up", "1 while the engine answers.", value=float(self._up))
        about = GaugeMetricFamily("fluent_build_info", "Always 1.", labels=["version", "model"])
        about.add_metric([__version__, self._services.model], 1.0)
        yield about
