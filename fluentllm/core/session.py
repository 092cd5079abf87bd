"""One client of the engine, seen from the engine's loop: takes its messages, gives back the engine's.

The engine process has one for each connection of the socket, `LocalEngineClient` one for itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from .errors import FluentError
from .types import (
    Abort,
    ControlCall,
    ControlReply,
    EngineStats,
    FinishReason,
    FromEngine,
    Generate,
    ModelInfo,
    Ready,
    Refused,
    Request,
    ToEngine,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .protocols import EngineCall

log = logging.getLogger(__name__)


class EngineConnection(Protocol):
    def submit(self, request: Request) -> None:
        """Raises `QueueFull`, `ContextTooLong`, `InvalidRequest`."""
        ...

    def abort(self, ids: list[str], reason: FinishReason = "abort") -> None:
        """Ids that are not running are ignored. `reason`: what observers are told."""
        ...

    def close(self) -> None:
        """Abort all of this connection's requests."""
        ...


class Engine(Protocol):
    """What processes and clients need of an engine; all but `run` is called in the loop that runs it."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def has_work(self) -> bool: ...

    last_progress: float
    """When a step was last collected, or the loop idled; monotonic clock."""

    calls: Mapping[str, EngineCall]
    """What plugins offer to front ends (`fluent_calls`), by name."""

    async def run(self) -> None:
        """Until `stop`."""
        ...

    def stop(self) -> None: ...

    def connect(self, deliver: Callable[[FromEngine], None]) -> EngineConnection: ...

    def stats(self) -> EngineStats: ...

    def clear_cache(self) -> None: ...


def refusal(request_id: str, error: FluentError) -> Refused:
    """The message that carries `error` to the front end."""
    return Refused(id=request_id, code=error.code, status=error.status, message=str(error), param=error.param)


class Session:
    """`received` takes one message; answers and outputs go to `deliver`, the first of them `Ready`."""

    def __init__(self, engine: Engine, deliver: Callable[[FromEngine], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        deliver(Ready(info=engine.info))
        self._connection = engine.connect(deliver)

    def received(self, message: ToEngine) -> None:
        if isinstance(message, Generate):
            self._submit(message.request)
        elif isinstance(message, Abort):
            self._connection.abort(message.ids, message.reason)
        else:
            self._control(message)

    def _submit(self, request: Request) -> None:
        try:
            self._connection.submit(request)
        except FluentError as error:
            self._deliver(refusal(request.id, error))
        except Exception as error:  # a bug, which must not take the other requests along
            log.exception("request %s could not be submitted", request.id)
            self._deliver(refusal(request.id, FluentError(f"The engine failed on this request: {error!r}.")))

    def _control(self, call: ControlCall) -> None:
        if call.method == "plugin":
            self._deliver(self._plugin(call))
            return
        if call.method == "clear_cache":
            self._engine.clear_cache()
        self._deliver(ControlReply(id=call.id, stats=self._engine.stats()))

    def _plugin(self, call: ControlCall) -> ControlReply:
        function = self._engine.calls.get(call.name)
        if function is None:
            known = ", ".join(sorted(self._engine.calls)) or "none"
            return ControlReply(id=call.id, error=f"No plugin of the engine offers the call {call.name!r}; there are: {known}.")
        try:
            data = function(self._engine, call.data)
            if not isinstance(data, bytes):
                raise TypeError(f"it returned {type(data).__name__}, not bytes")
            return ControlReply(id=call.id, data=data)
        except Exception as error:
            log.exception("the call %r of a plugin failed", call.name)
            return ControlReply(id=call.id, error=f"The call {call.name!r} raised {type(error).__name__}: {error}.")

    def abort(self, ids: list[str]) -> None:
        self._connection.abort(ids)

    def close(self) -> None:
        self._connection.close()
