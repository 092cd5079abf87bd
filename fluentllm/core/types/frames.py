"""Frames between front end and engine."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from .models import EngineStats, ModelInfo
from .requests import Request, RequestOutput


class Generate(Struct, frozen=True, tag="generate"):
    request: Request


class Abort(Struct, frozen=True, tag="abort", omit_defaults=True):
    """No more of these is wanted."""

    ids: list[str]
    reason: Literal["abort", "stop"] = "abort"
    """stop: they are complete, because their text came to a stop string, which only the front end sees."""


class ControlCall(Struct, frozen=True, tag="control"):
    """Ask the engine for something outside the token stream; answered by a `ControlReply` with the same id."""

    id: int
    method: Literal["stats", "clear_cache", "plugin"]
    name: str = ""
    """plugin: what a plugin registered by `fluent_calls`, and what it is given."""
    data: bytes = b""


class Ready(Struct, frozen=True, tag="ready"):
    """First frame from the engine."""

    info: ModelInfo


class Outputs(Struct, frozen=True, tag="outputs"):
    """Everything one step brought to this connection's requests."""

    outputs: list[RequestOutput]


class Refused(Struct, frozen=True, tag="refused"):
    """A request that did not enter, or broke later."""

    id: str
    code: str
    status: int
    message: str
    param: str | None = None


class ControlReply(Struct, frozen=True, tag="control_reply"):
    id: int
    stats: EngineStats | None = None
    data: bytes = b""
    """plugin: what it gave back."""
    error: str | None = None
    """plugin: why it could not be called."""


ToEngine = Generate | Abort | ControlCall
FromEngine = Ready | Outputs | Refused | ControlReply


def encode(message: Struct) -> bytes:
    return msgspec.msgpack.encode(message)
