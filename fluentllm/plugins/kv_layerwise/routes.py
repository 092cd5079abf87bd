"""`GET /handoff`: the engine's role, and where it takes control connections; what `fluent proxy` asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.types import HandoffDoor
from ...frontend.responses import json_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


async def handoff(request: Request) -> Response:
    services = request.app.state.fluent
    info = services.client.info
    door = info.handoff if info is not None else None
    return json_response(door or HandoffDoor(role=services.settings.disaggregation.role))
