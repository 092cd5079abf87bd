"""What plugins are given to register with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import msgspec

    from .models import Checkpoint, ModelFamily, WeightsContext


Supports = Callable[[Any], str | None]
"""Given the spec in question, None, or the reason why not."""


EngineCall = Callable[[Any, bytes], bytes]
"""(engine, data) → data; see `RegisterCall`."""


class Register(Protocol):
    """`register(name, factory, supports=...)`: offer something that the config chooses by name, or `auto` chooses."""

    def __call__(self, name: str, factory: Callable[..., Any], *, supports: Supports = ...) -> None: ...


class RegisterCall(Protocol):
    """`function(engine, data) -> bytes`: called in the engine's loop, with its `core.session.Engine` and what was sent.
    It may not block. What it raises reaches the caller as an error."""

    def __call__(self, name: str, function: EngineCall) -> None: ...


class RegisterConfig(Protocol):
    def __call__(self, struct: type[msgspec.Struct]) -> None: ...


class RegisterModel(Protocol):
    def __call__(self, architecture: str, family: ModelFamily) -> None: ...


class RegisterWeights(Protocol):
    """`supports(path)` says whether the reader can open what lies at `path` (a folder or a file)."""

    def __call__(self, name: str, factory: Callable[[WeightsContext], Checkpoint], *, supports: Supports = ...) -> None: ...


class RegisterRoute(Protocol):
    """`endpoint(request: starlette.requests.Request) -> starlette.responses.Response`, async. The front end's services
    are at `request.app.state.fluent` (`fluentllm.frontend.services.Services`)."""

    def __call__(
        self, path: str, endpoint: Callable[[Any], Awaitable[Any]], *, methods: SequenceOf[str] = ("GET",), summary: str = ""
    ) -> None: ...
