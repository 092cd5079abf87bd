"""`GET /handoff`: the engine's role, where it takes control connections, and its counters; what `fluent proxy` asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from ...core.types import EngineStats, HandoffDoor
from ...frontend.responses import json_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class HandoffState(Struct, kw_only=True):
    role: str
    host: str
    port: int
    stats: EngineStats


async def handoff(request: Request) -> Response:
    services = request.app.state.fluent
    stats: EngineStats = await services.client.stats()
    info = services.client.info
    door = (info and info.handoff) or HandoffDoor(role=services.settings.disaggregation.role)
    return json_response(HandoffState(role=door.role, host=door.host, port=door.port, stats=stats))
