"""A control connection between two engines: TCP, frames with a length before them, sealed and typed (`frames`, `messages`).

    link = await Link.open(host, port, key, timeout=5)
    link.listen(received, lost)          # from here on messages come by callback
    link.send(Describe(...))

Lives in one event loop. A frame that does not verify ends the connection: over TCP nothing but an attacker or a wrong key makes
one.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.errors import FluentError
from .frames import MAX_FRAME, ControlSession

if TYPE_CHECKING:
    from .messages import Group, Message

log = logging.getLogger("fluentllm.transfer")

_LENGTH = struct.Struct("!I")
MAX_UNSENT = 16 * MAX_FRAME
"""Bytes; a peer that reads so slowly is lost."""


class LinkError(FluentError):
    """A control connection cannot be made, or broke."""

    status, code = 503, "handoff_link"


class Link:
    """One connection, after both sides have said hello."""

    def __init__(self, session: ControlSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._session, self._reader, self._writer = session, reader, writer
        self._task: asyncio.Task[None] | None = None
        self._lost: Callable[[FluentError], None] | None = None
        self.closed = False
        self.name = "{}:{}".format(*writer.get_extra_info("peername")[:2])

    @classmethod
    async def open(cls, host: str, port: int, key: bytes, timeout: float) -> Link:
        """Raises `LinkError`, `FrameError`."""
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(host, port)
                return await cls.greet(reader, writer, key)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            what = str(error) or f"no answer within {timeout:g} s"
            raise LinkError(f"The engine at {host}:{port} cannot be reached: {what}.") from error

    @classmethod
    async def greet(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> Link:
        """Of a new connection, on either side. Raises `FrameError`, `OSError`, `asyncio.IncompleteReadError`."""
        session = ControlSession(key)
        try:
            _write(writer, session.hello())
            session.greet(await _read(reader, 1024))
        except BaseException:
            writer.close()
            raise
        return cls(session, reader, writer)

    def listen(self, received: Callable[[Message], None], lost: Callable[[FluentError], None]) -> None:
        """`lost` is called once, unless `close` was."""
        self._lost = lost
        self._task = asyncio.get_running_loop().create_task(self._run(received), name=f"link {self.name}")

    def send(self, message: Message) -> None:
        """Nothing happens on a closed one: `lost` says what became of it."""
        if self.closed:
            return
        _write(self._writer, self._session.seal(message))
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT:
            self._end(LinkError(f"{self.name} does not read its messages."))

    def seal(self, group: Group) -> bytes:
        """To be sent as a transport's notification."""
        return self._session.seal(group)

    def open_group(self, payload: bytes) -> Message | Group:
        """What came as a notification. Raises `FrameError`."""
        return self._session.open(payload)

    def close(self) -> None:
        self._lost = None
        self._end(None)

    def _end(self, error: FluentError | None) -> None:
        if self.closed:
            return
        self.closed = True
        self._writer.close()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if error is not None and self._lost is not None:
            self._lost(error)

    async def _run(self, received: Callable[[Message], None]) -> None:
        try:
            while not self.closed:
                message = self._session.open(await _read(self._reader, MAX_FRAME))
                received(message)  # type: ignore[arg-type]
        except (OSError, asyncio.IncompleteReadError) as error:
            self._end(LinkError(f"The connection to {self.name} broke: {error}."))
        except FluentError as error:
            self._end(error)
        except Exception as error:
            log.exception("handoff: a bug at the connection to %s", self.name)
            self._end(LinkError(f"{type(error).__name__}: {error}"))


def _write(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(_LENGTH.pack(len(frame)) + frame)


async def _read(reader: asyncio.StreamReader, limit: int) -> bytes:
    [size] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > limit:
        raise LinkError(f"A frame of {size:,} bytes; the most is {limit:,}.")
    return await reader.readexactly(size)
