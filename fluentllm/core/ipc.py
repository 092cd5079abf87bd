"""Messages between processes: msgpack frames over Unix sockets, between the front end's client and the engine.

A frame is a header (two big-endian 32-bit numbers: bytes of the payload, generation of the engine) and one msgpack
message of the direction's tagged union. What is sent within one turn of the event loop leaves in one write. A frame of
another generation is counted and dropped; a peer that breaks the format, or that does not read, is disconnected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import msgspec

from .errors import ConfigError, FluentError
from .types import FromEngine, ToEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

HEADER = struct.Struct(">II")
_HOLE = bytes(HEADER.size)

MAX_FRAME = 64 * 1024 * 1024
"""Bytes of one payload. The longest that occur: a long prompt, or all its logprobs."""
MAX_UNSENT = 2 * MAX_FRAME
"""Bytes that may wait for a peer to read them."""
HIGH_WATER = 1024 * 1024
"""A peer that leaves more than this unread is behind; if it then reads nothing for `STALL_TIMEOUT` it is disconnected."""
STALL_TIMEOUT = 30.0
"""Seconds."""
MAX_PATH = 99
"""Bytes of a socket's path: the smallest `sun_path` among systems has 104, its end mark included."""

_encoder = msgspec.msgpack.Encoder()
to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

In = TypeVar("In")
In_contra = TypeVar("In_contra", contravariant=True)


class FrameTooLarge(FluentError):
    """A message does not fit a frame; nothing of it was sent."""

    status, code = 413, "message_too_large"


class Peer(Protocol[In_contra]):
    """Who owns one end of a connection. Both methods are called in the loop, and may not block."""

    def received(self, message: In_contra) -> None: ...

    def lost(self, reason: str) -> None:
        """Once, when the connection has ended: by the other side, by an error, by `close`."""
        ...


class Connection(asyncio.Protocol, Generic[In]):
    """One end of a connection: `send` encodes and collects, the loop writes; what arrives goes to the `Peer`.

    `generation` is stamped on what is sent and required of what arrives. None: take that of the first frame, if it is
    at least `oldest`.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[In],
        accept: Callable[[Connection[In]], Peer[In]],
        *,
        generation: int | None,
        oldest: int = 0,
        max_frame: int = MAX_FRAME,
        max_unsent: int = MAX_UNSENT,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        self.generation = generation
        self.stale = 0
        """Frames dropped because they were of another generation."""
        self._oldest = oldest
        self._decode = decoder.decode
        self._accept = accept
        self._max_frame = max_frame
        self._max_unsent = max_unsent
        self._stall_timeout = stall_timeout
        self._loop = asyncio.get_running_loop()
        self._peer: Peer[In] | None = None
        self._transport: asyncio.Transport | None = None
        self._in = bytearray()
        self._out = bytearray()
        self._flush_planned = False
        self._stall: asyncio.TimerHandle | None = None
        self._written = 0
        self._read = 0  # bytes of those that had left at the last look for a stall
        self._idle_looks = 0
        self._reason = "the other side closed the connection"

    # ------------------------------------------------------------------------------------------------------------ sending
    @property
    def open(self) -> bool:
        return self._transport is not None

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message; a connection that is closed already swallows it. Raises `FrameTooLarge`."""
        if self._transport is None:
            return
        if self.generation is None:
            raise RuntimeError("the generation of the engine is not known before its first frame")
        out = self._out
        start = len(out)
        out += _HOLE
        _encoder.encode_into(message, out, -1)
        length = len(out) - start - HEADER.size
        if length > self._max_frame:
            del out[start:]
            raise FrameTooLarge(
                f"A {type(message).__name__} message has {length:,} bytes; one can have at most {self._max_frame:,}.",
                fix="Ask for a shorter prompt or fewer logprobs.",
            )
        HEADER.pack_into(out, start, length, self.generation)
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand what was collected to the transport now, instead of at the end of the loop's turn."""
        self._flush_planned = False
        transport, out = self._transport, self._out
        if transport is None or not out:
            return
        self._out = bytearray()
        self._written += len(out)
        transport.write(out)
        unsent = transport.get_write_buffer_size()
        if unsent > self._max_unsent:
            self._break(f"the other side does not read: {unsent:,} bytes wait for it")

    def close(self) -> None:
        """Write what is queued, then close."""
        self.flush()
        if self._transport is not None:
            self._reason = "closed on this side"
            self._transport.close()

    def _break(self, reason: str) -> None:
        if self._transport is not None:
            self._reason = reason
            self._transport.abort()

    # ---------------------------------------------------------------------------------------------- asyncio.Protocol's side
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # by duck type: uvloop's has another base
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        self._peer = self._accept(self)

    def data_received(self, data: bytes) -> None:
        buffer = self._in
        if not buffer:
            used = self._frames(data)
            if used < len(data):
                buffer += memoryview(data)[used:]
            return
        buffer += data
        if len(buffer) >= HEADER.size and len(buffer) >= HEADER.size + HEADER.unpack_from(buffer)[0]:
            used = self._frames(buffer)
            del buffer[:used]

    def _frames(self, data: bytes | bytearray) -> int:
        """Deliver all whole frames at the start of `data` → bytes used."""
        at, end = 0, len(data)
        with memoryview(data) as view:
            while end - at >= HEADER.size and self._transport is not None and not self._transport.is_closing():
                length, generation = HEADER.unpack_from(view, at)
                if length > self._max_frame:
                    self._break(f"a frame of {length:,} bytes is announced, at most {self._max_frame:,} are allowed")
                    break
                first = at + HEADER.size
                if end - first < length:
                    break
                at = first + length
                if self._current(generation):
                    with view[first:at] as payload:
                        self._deliver(payload)
        return at

    def _current(self, generation: int) -> bool:
        if self.generation is None and generation >= self._oldest:
            self.generation = generation
        if generation == self.generation:
            return True
        self.stale += 1
        return False

    def _deliver(self, payload: memoryview) -> None:
        assert self._peer is not None
        try:
            message = self._decode(payload)
        except msgspec.DecodeError as error:  # ValidationError too
            self._break(f"a frame could not be decoded: {error}")
            return
        self._peer.received(message)

    def pause_writing(self) -> None:
        self._idle_looks = 0
        self._read = self._left()
        self._stall = self._loop.call_later(self._stall_timeout / 2, self._look_for_stall)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _left(self) -> int:
        """Bytes that have left for the other side."""
        assert self._transport is not None
        return self._written - self._transport.get_write_buffer_size()

    def _look_for_stall(self) -> None:
        """Two looks in a row without progress are a stall. One may come late, because this process was slow itself, and
        before the loop had a chance to write; between two it has one."""
        left = self._left()
        self._idle_looks = self._idle_looks + 1 if left == self._read else 0
        self._read = left
        if self._idle_looks == 2:
            self._break(f"the other side has not read for {self._stall_timeout:g} seconds")
        else:
            self._stall = self._loop.call_later(self._stall_timeout / 2, self._look_for_stall)

    def connection_lost(self, error: Exception | None) -> None:
        self.resume_writing()
        self._transport = None
        self._out = bytearray()
        if error is not None:
            self._reason = str(error) or type(error).__name__
        if self.stale:
            log.info("%d frames of an earlier engine were dropped", self.stale)
        if self._peer is not None:
            self._peer.lost(self._reason)


def checked(path: Path) -> str:
    """`path` as text, if a Unix socket can have it. Raises `ConfigError`."""
    text = os.fspath(path)
    if len(os.fsencode(text)) > MAX_PATH:
        raise ConfigError(
            f"The socket path {text!r} has {len(os.fsencode(text))} bytes; Unix sockets allow {MAX_PATH}.",
            fix="Point TMPDIR at a folder with a short path, such as /tmp.",
        )
    return text


async def serve(
    path: Path,
    on_connection: Callable[[Connection[ToEngine]], Peer[ToEngine]],
    *,
    generation: int,
    **limits: Any,
) -> asyncio.Server:
    """Listen at `path` as the engine of this generation; only this user may connect. `limits` are `Connection`'s."""
    text = checked(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(text)

    def make() -> Connection[ToEngine]:
        return Connection(to_engine, on_connection, generation=generation, **limits)

    server = await asyncio.get_running_loop().create_unix_server(make, text)
    os.chmod(text, 0o600)
    return server


async def connect(
    path: Path, on_connection: Callable[[Connection[FromEngine]], Peer[FromEngine]], *, oldest: int = 0, **limits: Any
) -> Connection[FromEngine]:
    """Connect to the engine at `path`, of generation `oldest` or later. Raises OSError while none listens."""
    text = checked(path)

    def make() -> Connection[FromEngine]:
        return Connection(from_engine, on_connection, generation=None, oldest=oldest, **limits)

    _, connection = await asyncio.get_running_loop().create_unix_connection(make, text)
    return connection
