"""What routers say to hand a request over between a prefill and a decode engine, and what they are told.

Two conventions, one meaning: `bootstrap_host`, `bootstrap_port` and `bootstrap_room` go to both engines at once; or the prefill
engine answers with `kv_transfer_params`, which the router passes on to the decode engine. These fields point an engine at
another machine, so they are taken only from who has shown the API key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

from msgspec import Meta, Struct

from fluentllm.core.errors import FluentError, InvalidRequest
from fluentllm.core.types import Handoff
from fluentllm.frontend.generation import new_id

if TYPE_CHECKING:
    from fluentllm.core.types import HandoffReport
    from fluentllm.frontend.services import Services

    from .schema import GenerationRequest

T = TypeVar("T", str, int)

Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(min_length=1, max_length=96)]
Room = Annotated[int, Meta(ge=0)]
Several = Meta(min_length=1, max_length=16384)
# SGLang's router sends a list, one for each choice, where n is above 1.
Hosts = Annotated[list[str], Several]
Ports = Annotated[list[Port], Several]
Rooms = Annotated[list[Room], Several]


class KVTransferParams(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a prompt's KV waits. With the names that vLLM's routers use; `handoff` is the one that matters here."""

    do_remote_decode: bool | None = None
    """Asks a prefill engine to keep the prompt for a decode engine."""
    do_remote_prefill: bool | None = None
    """Tells a decode engine to fetch it."""
    remote_engine_id: str | None = None
    remote_block_ids: list[int] | None = None
    """Not used: pages are told by the engines themselves, when they talk to each other."""
    remote_host: str | None = None
    remote_port: Port | None = None
    handoff: Name | None = None


class DisaggregatedParams(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The same, as Dynamo wraps it."""

    kv_transfer_params: KVTransferParams | None = None
    bootstrap_host: str | None = None
    bootstrap_port: Port | None = None
    bootstrap_room: int | None = None


class HandoffForbidden(FluentError):
    """Handoff fields from who has not shown a key."""

    status, code = 403, "handoff_forbidden"


def handoff_of(body: GenerationRequest, services: Services) -> Handoff | None:
    """What the body asks for; None if it is an ordinary request. Raises `InvalidRequest`, `HandoffForbidden`."""
    wrapped = body.disaggregated_params or DisaggregatedParams()
    params = body.kv_transfer_params or wrapped.kv_transfer_params
    room = _only("bootstrap_room", body.bootstrap_room, differ=True)
    room = room if room is not None else wrapped.bootstrap_room
    pulls = params is not None and (params.do_remote_decode or params.handoff is not None)
    if room is None and not pulls:
        return None
    role, field = services.settings.disaggregation.role, "bootstrap_room" if room is not None else "kv_transfer_params"
    if role == "both":
        raise InvalidRequest(
            f"{field} is given, but this engine prefills and decodes itself.",
            fix="Start it with --role prefill or --role decode, or leave the field out.",
            param=field,
        )
    if services.settings.server.api_key is None:
        raise HandoffForbidden(
            f"{field} is taken from authenticated routers only, and this server asks for no key.",
            fix="Set server.api_key, and give the key to the router.",
            param=field,
        )
    if room is not None:
        host = _only("bootstrap_host", body.bootstrap_host) or wrapped.bootstrap_host
        port = _only("bootstrap_port", body.bootstrap_port)
        port = port if port is not None else wrapped.bootstrap_port
        return _handoff(f"room-{room}", role, host, port, concurrent=True)
    assert params is not None
    return _handoff(params.handoff or new_id("kv"), role, params.remote_host, params.remote_port)


def _only(field: str, value: T | list[T] | None, *, differ: bool = False) -> T | None:
    """Of a list the first: both engines are sent the same one, and choices are told apart by their number."""
    if not isinstance(value, list):
        return value
    if not differ and any(item != value[0] for item in value):
        raise InvalidRequest(
            f"{field} names several prefill engines; all choices of a request are computed by one.",
            fix="Send one request for each.",
            param=field,
        )
    return value[0]


def _handoff(name: str, role: str, host: str | None, port: int | None, *, concurrent: bool = False) -> Handoff:
    if role == "prefill":
        return Handoff(id=name, concurrent=concurrent)
    if not host or not port:
        raise InvalidRequest(
            "The request does not say where its prompt is computed.",
            fix="Send bootstrap_host and bootstrap_port, or the kv_transfer_params that the prefill engine answered with.",
        )
    return Handoff(id=name, host=host, port=port, concurrent=concurrent)


def transfer_params(report: HandoffReport | None) -> KVTransferParams | None:
    """What a prefill engine's answer tells the router; of a request's first choice, whose name all share."""
    if report is None or not report.port:
        return None
    return KVTransferParams(
        do_remote_prefill=True,
        remote_host=report.host,
        remote_port=report.port,
        handoff=report.id.rpartition("/")[0],
    )
