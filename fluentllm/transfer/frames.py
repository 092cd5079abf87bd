"""Seals control messages: who does not have the shared key can neither make, change, repeat nor replay one.

    ours, theirs = ControlSession(key), ControlSession(key)          # one on each side of each connection
    ours.greet(theirs.hello()), theirs.greet(ours.hello())
    message = theirs.open(ours.seal(Drained(of=attempt)))

A frame is version (1 byte), kind (1), sequence (8), body (msgpack), MAC (32). The MAC is HMAC-SHA256 over all before it, with
a key made from the shared key, a nonce that either side drew for this connection, and the direction. So a frame of another
connection, or sent back to its sender, does not verify; within the connection the sequence number tells repeats. Frames are
not encrypted: the shared key proves who speaks, no more.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Any

import msgspec

from ..core.errors import ConfigError, FluentError
from .messages import Group, Message

VERSION = 1
MAX_FRAME = 1024 * 1024
"""Bytes, sealed."""
NONCE, MAC = 16, 32
WINDOW = 1024
"""Frames may come in another order; one that is this much older than the newest is refused."""
MIN_KEY = 16
_HEAD = struct.Struct("!BBQ")
_HELLO, _CONTROL, _GROUP = 1, 2, 3
_HELLO_LABEL, _KEY_LABEL = b"fluent kv hello", b"fluent kv session"


class FrameError(FluentError):
    """A control frame that is not accepted; `code` says why."""

    status, code = 400, "frame_malformed"


class FrameForged(FrameError):
    """Its MAC is not made with our key for this connection and direction."""

    status, code = 403, "frame_forged"


class FrameRepeated(FrameError):
    """It was opened before, or is too old to tell."""

    code = "frame_repeated"


class ReplayWindow:
    """Which of the last `WINDOW` sequence numbers were seen."""

    def __init__(self) -> None:
        self.newest = 0
        self._seen = 0
        """Bit i: newest - i."""

    def check(self, sequence: int) -> None:
        """Raises `FrameRepeated`."""
        age = self.newest - sequence
        if sequence < 1 or age >= WINDOW or (age >= 0 and self._seen >> age & 1):
            raise FrameRepeated(f"Frame {sequence} came before, or is too old; the newest is {self.newest}.")

    def add(self, sequence: int) -> None:
        """Of a frame that was checked and verified."""
        ahead = sequence - self.newest
        if ahead > 0:
            self._seen = (self._seen << min(ahead, WINDOW) | 1) & ((1 << WINDOW) - 1)
            self.newest = sequence
        else:
            self._seen |= 1 << -ahead


class ControlSession:
    """One side of one connection. Not for several threads."""

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY:
            raise ConfigError(
                f"The shared key of prefill and decode has {len(key)} bytes; {MIN_KEY} is the least.",
                fix="Generate one, such as by openssl rand -hex 32, and give it to all engines.",
            )
        self._key = key
        self._nonce = secrets.token_bytes(NONCE)
        self._out: bytes | None = None
        self._in: bytes | None = None
        self._sequence = 0
        self._windows = {kind: ReplayWindow() for kind in (_CONTROL, _GROUP)}
        self._decoders: dict[int, msgspec.msgpack.Decoder[Any]] = {
            _CONTROL: msgspec.msgpack.Decoder(Message),
            _GROUP: msgspec.msgpack.Decoder(Group),
        }
        self._encoder = msgspec.msgpack.Encoder()

    def hello(self) -> bytes:
        """Send this first."""
        head = _HEAD.pack(VERSION, _HELLO, 0) + self._nonce
        return head + _mac(self._key, _HELLO_LABEL + head)

    def greet(self, hello: bytes) -> None:
        """Take the other side's `hello`. Raises `FrameError`; a second one is refused."""
        if self._in is not None:
            raise FrameRepeated("The other side says hello twice.")
        if len(hello) != _HEAD.size + NONCE + MAC or hello[:2] != bytes((VERSION, _HELLO)):
            raise FrameError(f"{len(hello)} bytes are no hello of version {VERSION}.")
        head, mac = hello[:-MAC], hello[-MAC:]
        if not hmac.compare_digest(mac, _mac(self._key, _HELLO_LABEL + head)):
            raise FrameForged("The other side's hello is not made with the shared key.", fix="Give both the same key.")
        theirs = head[_HEAD.size :]
        if theirs == self._nonce:
            raise FrameForged("The other side sends our own hello back.")
        self._out = _mac(self._key, _KEY_LABEL + self._nonce + theirs)
        self._in = _mac(self._key, _KEY_LABEL + theirs + self._nonce)

    def seal(self, message: Message | Group) -> bytes:
        """Raises `FrameError` for a message that is too large, or before `greet`."""
        if self._out is None:
            raise FrameError("The other side has not said hello yet.")
        self._sequence += 1
        kind = _GROUP if isinstance(message, Group) else _CONTROL
        frame = _HEAD.pack(VERSION, kind, self._sequence) + self._encoder.encode(message)
        if len(frame) + MAC > MAX_FRAME:
            raise FrameError(f"A {type(message).__name__} of {len(frame):,} bytes; the most is {MAX_FRAME - MAC:,}.")
        return frame + _mac(self._out, frame)

    def open(self, frame: bytes) -> Message | Group:
        """The message. Raises `FrameForged`, `FrameRepeated`, or `FrameError` for what cannot be read; a frame that was
        refused changes nothing."""
        if self._in is None:
            raise FrameError("The other side has not said hello yet.")
        if not _HEAD.size + MAC < len(frame) <= MAX_FRAME:
            raise FrameError(f"A frame of {len(frame):,} bytes.")
        body, mac = frame[:-MAC], frame[-MAC:]
        if not hmac.compare_digest(mac, _mac(self._in, body)):
            raise FrameForged("A frame's MAC is wrong.")
        version, kind, sequence = _HEAD.unpack_from(body)
        decoder = self._decoders.get(kind)
        if version != VERSION or decoder is None:
            raise FrameError(f"A frame of version {version}, kind {kind}.")
        window = self._windows[kind]
        window.check(sequence)
        try:
            message: Message | Group = decoder.decode(memoryview(body)[_HEAD.size :])
        except (msgspec.DecodeError, RecursionError) as error:
            raise FrameError(f"A frame's body is no message: {error}.") from error
        window.add(sequence)
        return message


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)
