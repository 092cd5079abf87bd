"""Typed errors: each knows its HTTP status, its machine-readable code, its cause and what would fix it.

Everything a user can cause raises one of these; the command line prints `message` and `fix`, the API sends them in
OpenAI's error format. Anything else that escapes is a bug and is reported as one (status 500).
"""

from __future__ import annotations


class FluentError(Exception):
    """Base of all. `fix` is what to type or change instead, as one sentence; `param` names the field at fault."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, fix: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message


class ConfigError(FluentError):
    """A setting is unknown, of the wrong type, or does not fit another."""

    status, code = 400, "invalid_config"


class PluginError(FluentError):
    """A plugin cannot be loaded, or claims what another claims."""

    code = "plugin_error"


class CheckpointError(FluentError):
    """A checkpoint is not what its config says: tensors missing, extra or misshapen, an unknown format."""

    code = "invalid_checkpoint"


class ModelNotFound(FluentError):
    status, code = 404, "model_not_found"


class OutOfMemory(FluentError):
    """The plan does not fit; the message has the numbers, the fix the setting that would fit."""

    status, code = 503, "out_of_memory"


class InvalidRequest(FluentError):
    status, code = 400, "invalid_request"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class BodyTooLarge(FluentError):
    """An HTTP body over `server.max_body_bytes`."""

    status, code = 413, "body_too_large"


class BodyTooSlow(FluentError):
    """An HTTP body that was not there after `server.body_timeout`."""

    status, code = 408, "body_timeout"


class QueueFull(FluentError):
    """The bounded queue is full: try again later."""

    status, code = 429, "queue_full"


class EngineDied(FluentError):
    """The engine process ended while the request ran; it is being restarted."""

    status, code = 503, "engine_died"


class EngineUnavailable(FluentError):
    """The engine is starting or being restarted, or the server stops before a request is done."""

    status, code = 503, "engine_unavailable"
