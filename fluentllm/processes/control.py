"""The line between the supervisor and each of its children: a socket pair with one JSON message a line.

A child says when it is up and why it cannot start; the supervisor says what the engine is doing. That the line breaks is
how either learns that the other is gone: a child whose supervisor died ends at once, whatever it is busy with.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Literal

import msgspec

from fluentllm.core.types import ModelInfo, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.errors import FluentError

EXIT_REFUSED = 2
"""Exit code of a child that cannot start for a reason that would repeat; the line says which."""
EXIT_HANG = 3
EXIT_ORPHANED = 4

EngineState = Literal["starting", "ready", "restarting", "failed"]
Example = Literal["chat", "text"]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """One line for the user, while a child starts."""

    line: str


class Up(msgspec.Struct, frozen=True, tag="up"):
    """The child serves now. `info` from the engine, `example` from the front end."""

    info: ModelInfo | None = None
    example: Example | None = None
    """What a user may try first; None: no route for either."""
    startup: tuple[Stage, ...] = ()
    """Of the front end; the engine's are in `info`."""


class Linked(msgspec.Struct, frozen=True, tag="linked"):
    """The front end has reached the engine: requests would be answered now."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The child cannot start, and could not the next time either."""

    message: str
    fix: str | None = None
    param: str | None = None


class EngineIs(msgspec.Struct, frozen=True, tag="engine"):
    """From the supervisor to the front end."""

    state: EngineState


FromChild = Progress | Up | Linked | Failed
_encoder = msgspec.json.Encoder()
_from_child = msgspec.json.Decoder(FromChild)
_from_supervisor = msgspec.json.Decoder(EngineIs)


class ChildEnd:
    """The child's end. A thread of its own reads, so that the loss of the supervisor is noticed by a busy child too."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        self._lock = threading.Lock()
        self._on_state: Callable[[EngineState], None] | None = None
        self._state: EngineState | None = None

    def start(self, on_orphaned: Callable[[], None] | None = None) -> None:
        """Watch the supervisor; when it is gone, call `on_orphaned` and end this process."""
        threading.Thread(target=self._read, args=(on_orphaned,), name="control line", daemon=True).start()

    def on_state(self, call: Callable[[EngineState], None]) -> None:
        """`call`, on the line's thread, for the last state that came and for every one that comes."""
        with self._lock:
            self._on_state = call
            if self._state is not None:
                call(self._state)

    def send(self, message: FromChild) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, and with it soon this process
            self._socket.sendall(_encoder.encode(message) + b"\n")

    def refuse(self, error: FluentError) -> None:
        self.send(Failed(error.message, error.fix, error.param))

    def _read(self, on_orphaned: Callable[[], None] | None) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                message = _from_supervisor.decode(line)
                with self._lock:
                    self._state = message.state
                    if self._on_state is not None:
                        self._on_state(message.state)
        try:
            if on_orphaned is not None:
                on_orphaned()
        finally:
            os._exit(EXIT_ORPHANED)


class SupervisorEnd:
    """The supervisor's end, in its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> SupervisorEnd:
        reader, writer = await asyncio.open_connection(sock=end, limit=1 << 20)
        return cls(reader, writer)

    async def receive(self) -> FromChild | None:
        """The next message; None when the child is gone."""
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        return _from_child.decode(line) if line.endswith(b"\n") else None

    def send(self, message: EngineIs) -> None:
        if not self._writer.is_closing():
            self._writer.write(_encoder.encode(message) + b"\n")

    def close(self) -> None:
        self._writer.close()


def die_with_parent() -> None:
    """Let the Linux kernel kill this process when its parent ends: it works even where Python is stuck in C code."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended just before
        os._exit(EXIT_ORPHANED)
