"""The folder in which one server's processes meet: the engine's socket and what children must know at their start.

The supervisor makes it, readable by this user only, and removes it; its path is short, because sockets lie in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fluentllm.core import ipc
from fluentllm.core.errors import ConfigError
from fluentllm.hub.files import ModelFiles

if TYPE_CHECKING:
    from fluentllm.core.settings import Settings

PREFIX = "fluent-"
ENGINE_SOCKET = "engine.sock"
START_FILE = "start.json"


class Start(msgspec.Struct, kw_only=True):
    """What every child reads when it starts."""

    settings: msgspec.Raw
    """As JSON: plugins' parts of it get their types once the plugins are loaded (`config.from_json`)."""
    files: ModelFiles
    origin: float
    """Where the start's timeline begins, in seconds since the epoch."""


class RuntimeFolder:
    """An existing folder; `create` makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls) -> RuntimeFolder:
        """A new 0700 folder under the user's runtime or temporary folder, or under /tmp where those have long paths."""
        bases = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
        longest = ipc.MAX_PATH - len(f"/{PREFIX}12345678/{ENGINE_SOCKET}")
        for base in bases:
            if base and len(os.fsencode(base)) <= longest and os.access(base, os.W_OK | os.X_OK):
                return cls(Path(tempfile.mkdtemp(prefix=PREFIX, dir=base)))
        tried = ", ".join(base for base in bases if base)
        raise ConfigError(
            f"Sockets need a writable folder with a path of at most {longest} bytes; none of these is one: {tried}.",
            fix="Set TMPDIR to a short one, such as ~/t.",
        )

    @property
    def engine_socket(self) -> Path:
        return self.path / ENGINE_SOCKET

    def write_start(self, settings: Settings, files: ModelFiles, origin: float) -> None:
        """Only this user may read it: there may be an API key in the settings."""
        descriptor = os.open(self.path / START_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            start = Start(settings=msgspec.Raw(msgspec.json.encode(settings)), files=files, origin=origin)
            file.write(msgspec.json.encode(start, enc_hook=str))  # the hook is for paths

    def read_start(self) -> Start:
        return msgspec.json.decode((self.path / START_FILE).read_bytes(), type=Start, dec_hook=_typed)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _typed(kind: type, value: object) -> object:
    return Path(str(value)) if kind is Path else value
