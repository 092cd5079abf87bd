"""One end of a transport under test, in this process or in another: plain values in and out, so that both look the same.

`python -m fluentllm.testing FACTORY FD` is the other process: it makes ends and answers calls, msgpack frames on the socket
FD, until the socket closes.
"""

from __future__ import annotations

import importlib
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from ..core.settings import Settings
from ..core.transport import (
    KVTransport,
    Notified,
    Peer,
    PeerDied,
    PeerGone,
    PeerReady,
    TransferDone,
    TransportClosed,
    TransportContext,
    TransportError,
    WriteRefused,
)

Factory = Callable[[TransportContext], KVTransport]
Event = tuple[Any, ...]
"""("ready", peer), ("done", transfer, status, size), ("note", peer, payload, intact), ("gone", peer, error code or None)."""
ERRORS = {error.code: error for error in (TransportError, PeerDied, WriteRefused, TransportClosed)}


def checked_note(number: int, offset: int, data: bytes) -> bytes:
    """A notification that tells the receiving end what must lie at `offset` by now."""
    return msgspec.msgpack.encode([number, offset, len(data), zlib.crc32(data)])


class LocalEnd:
    """A transport with its memory."""

    def __init__(self, factory: Factory, name: str, host: str, device: str) -> None:
        self._woken = threading.Event()
        self._transport = factory(TransportContext(name, host, Settings(), self._woken.set))
        self._device = device
        self._tensors: list[Any] = []
        self._peers: dict[int, Peer] = {}

    def register(self, sizes: list[int], seed: int) -> bytes:
        """New memory of random bytes; the old stays readable as `previous`."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._previous = self._tensors
        self._tensors = [
            torch.randint(-(2**62), 2**62, (size // 8 + 1,), generator=generator).view(torch.uint8)[:size].to(self._device)
            for size in sizes
        ]
        epoch = self._transport.register(self._tensors)
        assert epoch == self._transport.epoch, "register returns the epoch"
        return self._transport.metadata()

    def memory(self) -> bytes:
        return b"".join(tensor.cpu().numpy().tobytes() for tensor in self._tensors)

    def previous(self) -> bytes:
        return b"".join(tensor.cpu().numpy().tobytes() for tensor in self._previous)

    def fill(self, value: int) -> None:
        import torch

        for tensor in self._tensors:
            tensor.fill_(value)
        if self._tensors[0].is_cuda:
            torch.cuda.synchronize(self._tensors[0].device)  # the peer writes in no order with our stream

    def connect(self, metadata: bytes) -> int:
        peer = self._transport.connect(metadata)
        self._peers[peer.number] = peer
        return peer.number

    def submit(self, peer: int, rows: list[list[int]], note: bytes | None) -> int:
        import numpy as np

        writes = np.array(rows, dtype=np.int64).reshape(-1, 3) if all(len(row) == 3 for row in rows) else np.array(rows)
        return self._transport.submit(self._peers[peer], writes, note)

    def cancel(self, transfer: int) -> None:
        self._transport.cancel(transfer)

    def disconnect(self, peer: int) -> None:
        self._transport.disconnect(self._peers[peer])

    def expect(self, handoffs: int) -> None:
        self._transport.expect(handoffs)

    def events(self, timeout: float) -> list[Event]:
        """Those that are there, after waiting for `wake` if there are none."""
        found = self._transport.poll()
        if not found and timeout:
            self._woken.wait(timeout)
            found = self._transport.poll()
        self._woken.clear()
        # What came between poll and clear would be missed.
        found += self._transport.poll()
        return [self._plain(event) for event in found]

    def epoch(self) -> int:
        return self._transport.epoch

    def revokes(self) -> bool:
        return self._transport.revokes

    def counters(self) -> dict[str, int]:
        return dict(self._transport.counters.as_dict())

    def close(self) -> None:
        self._transport.close()

    def _plain(self, event: Any) -> Event:
        if isinstance(event, PeerReady):
            return ("ready", event.peer.number)
        if isinstance(event, TransferDone):
            assert (event.status == "failed") == (event.error is not None), event
            return ("done", event.transfer, event.status, event.size)
        if isinstance(event, Notified):
            return ("note", event.peer.number, event.payload, self._intact(event.payload))
        assert isinstance(event, PeerGone), event
        return ("gone", event.peer.number, event.error.code if event.error else None)

    def _intact(self, payload: bytes) -> bool:
        try:
            _, offset, size, check = msgspec.msgpack.decode(payload, type=tuple[int, int, int, int])
        except msgspec.DecodeError:
            return True
        for tensor in self._tensors:
            if offset < tensor.numel():
                return zlib.crc32(tensor[offset : offset + size].cpu().numpy()) == check
            offset -= tensor.numel()
        return size == 0


CALLS = (
    *("register", "memory", "previous", "fill", "connect", "submit", "cancel", "disconnect", "expect"),
    *("events", "epoch", "revokes", "counters", "close"),
)


class Host:
    """Another process, which ends can be made in."""

    def __init__(self, factory: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "fluentllm.testing", factory, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._ends = 0

    def end(self, name: str, host: str, device: str) -> RemoteEnd:
        self._ends += 1
        self.ask("new", self._ends, name, host, device)
        return RemoteEnd(self, self._ends)

    def ask(self, call: str, end: int, *arguments: Any) -> Any:
        write_frame(self._socket, [call, end, *arguments])
        ok, value = read_frame(self._socket)
        if not ok:
            code, message = value
            raise ERRORS.get(code, AssertionError)(message)
        return [tuple(event) for event in value] if call == "events" else value

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.wait()
        self._socket.close()

    def stop(self) -> None:
        """Let it end by itself, within ten seconds."""
        self._socket.close()
        try:
            assert self.process.wait(10) == 0, f"the other process ended with {self.process.returncode}"
        finally:
            self.process.kill()
            self.process.wait()


class RemoteEnd:
    """A `LocalEnd` of a host."""

    def __init__(self, host: Host, number: int) -> None:
        self.host = host
        self._number = number

    def __getattr__(self, call: str) -> Callable[..., Any]:
        if call not in CALLS:
            raise AttributeError(call)
        return lambda *arguments: self.host.ask(call, self._number, *arguments)


def write_frame(connection: socket.socket, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    connection.sendall(struct.pack("!Q", len(data)) + data)


def read_frame(connection: socket.socket) -> Any:
    [size] = struct.unpack("!Q", _exactly(connection, 8))
    return msgspec.msgpack.decode(_exactly(connection, size))


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the other process ended")
        data += part
    return bytes(data)


def load_factory(name: str) -> Factory:
    """`module:attribute`."""
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found  # type: ignore[return-value]


def serve(factory: str, descriptor: str) -> None:
    """The other process."""
    import torch

    torch.set_num_threads(1)
    make = load_factory(factory)
    ends: dict[int, LocalEnd] = {}
    with socket.socket(fileno=int(descriptor)) as connection:
        while True:
            try:
                call, number, *arguments = read_frame(connection)
            except EOFError:
                break
            answer: list[object]
            try:
                if call == "new":
                    ends[number] = LocalEnd(make, *arguments)
                    answer = [True, None]
                else:
                    answer = [True, getattr(ends[number], call)(*arguments)]
            except TransportError as error:
                answer = [False, [error.code, str(error)]]
            except Exception as error:
                answer = [False, ["", f"{call}: {type(error).__name__}: {error}"]]
            write_frame(connection, answer)
    for end in ends.values():
        end.close()
