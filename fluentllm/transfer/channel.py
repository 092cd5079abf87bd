"""One peer, seen from a transport's thread: transfers that wait, chunks under way, and how each of them ends."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ..core.transport import Peer, PeerDied, PeerReady, TransferDone, TransportCounters, TransportError, TransportEvent
from .wire import Envelope, Wire

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("fluentllm.transfer")

PROBE_EVERY = 0.5
"""Seconds between looks whether a peer still lives."""
MOST_UNDER_WAY = 64
"""Posts to one peer, however small: each is asked about at every look, 1 to 2 µs."""
POST_FOR = 1e-3
"""Seconds of one step after which no more is posted in it: other peers, cancellations and what has come wait meanwhile."""
LEAVE_WITHIN = 5.0
"""Seconds that chunks may be under way after `disconnect`; then the connection is cut under them."""


@dataclass(slots=True, eq=False)
class Transfer:
    number: int
    peer: Peer
    size: int
    chunks: deque[np.ndarray]
    """Not posted yet."""
    notification: bytes | None
    under_way: int = 0
    cancelled: bool = False
    notifying: bool = False
    error: TransportError | None = None

    @property
    def wants(self) -> bool:
        """Whether it has a chunk to post."""
        return bool(self.chunks) and not self.cancelled and self.error is None


@dataclass(slots=True, eq=False)
class Operation:
    """What the library is at. transfer: None for a probe. rows, size: what it takes of the window."""

    handle: Any
    transfer: Transfer | None
    rows: int = 0
    size: int = 0


@dataclass(slots=True, eq=False)
class Channel:
    """The thread calls `step` again and again; when `gone`, all of its transfers have ended and nothing is under way."""

    peer: Peer
    wire: Wire
    epoch: int
    """Our own, that the notifications carry."""
    counters: TransportCounters
    tell: Callable[[TransportEvent], None]
    connection: Any = None
    error: TransportError | None = None
    gone: bool = False
    ready: bool = False
    """The first probe was answered; until then nothing is written."""
    waits: bool = False
    """After the last `step` more is to be posted."""
    hurry: bool = False
    """More can be posted if `step` is called again at once, perhaps: its time was over, or room was made or taken in it."""
    _queue: deque[Transfer] = field(default_factory=deque)
    """Open transfers, oldest first."""
    _operations: list[Operation] = field(default_factory=list)
    """Under way."""
    _rows: int = 0
    _bytes: int = 0
    """Of what is under way."""
    _leaving: float | None = None
    _probed: float = 0.0
    _probing: bool = False

    def add(self, transfer: Transfer) -> None:
        self._queue.append(transfer)
        if self.gone or self._leaving is not None:
            transfer.error = self.error or PeerDied(f"{self.peer.name!r} was disconnected.")
            self._end(transfer)

    def cancel(self, number: int) -> None:
        for transfer in self._queue:
            if transfer.number == number:
                transfer.cancelled = True

    def leave(self) -> None:
        """Cancel everything; `gone` follows."""
        self._leaving = time.monotonic()
        for transfer in self._queue:
            transfer.cancelled = True

    def lose(self, error: TransportError) -> None:
        """The peer is gone, or shall be, at once."""
        if self.gone:
            return
        self.error, self.gone = error, True
        self._drop_operations()
        for transfer in list(self._queue):
            transfer.under_way = 0
            transfer.error = transfer.error or error
            self._end(transfer)

    def _drop_operations(self) -> None:
        for operation in self._operations:
            self.wire.abandon(operation.handle)
        self._operations.clear()
        self._rows = self._bytes = 0

    def step(self, *, look: bool = True) -> bool:
        """Look at what is under way, unless that is left to another step, end what is over, post what fits. Returns whether
        anything moves."""
        self.waits = self.hurry = False
        if self.gone:
            return False
        try:
            ended = look and self._look()
            self._probe()
            posted = self._post()
            self.hurry = self.waits and (ended or posted)
            for transfer in list(self._queue):
                self._advance(transfer)
        except PeerDied as error:
            self.lose(error)
            return True
        except Exception as error:
            log.exception("transport %s: a bug at the connection to %r", self.wire.kind, self.peer.name)
            self.lose(TransportError(f"{type(error).__name__}: {error}"))
            return True
        if self._leaving is not None:
            if not self._queue and all(item.transfer is None for item in self._operations):
                self._drop_operations()
                self.gone = True
            elif time.monotonic() - self._leaving > LEAVE_WITHIN:
                self.lose(PeerDied(f"{self.peer.name!r} kept what was under way to it; its connection was cut."))
        return bool(self._queue)

    def _look(self) -> bool:
        """Returns whether something ended."""
        before = len(self._operations)
        for item in self._operations[:]:
            transfer = item.transfer
            try:
                if not self.wire.finished(item.handle):
                    continue
            except PeerDied:
                self._over(item)
                raise
            except TransportError as error:
                if transfer is None:
                    self._over(item)
                    raise PeerDied(f"{self.peer.name!r} does not answer: {error}") from error
                transfer.error = transfer.error or error
                # Why it failed is not always told: the next probe says whether the peer is gone.
                self._probed = 0.0
            self._over(item)
            if transfer is None:
                self._probing = False
                self._answered()
            else:
                transfer.under_way -= 1
        return len(self._operations) < before

    def _over(self, item: Operation) -> None:
        self._operations.remove(item)
        self._rows -= item.rows
        self._bytes -= item.size

    def _answered(self) -> None:
        if not self.ready:
            self.ready = True
            self.tell(PeerReady(self.peer))

    def _advance(self, transfer: Transfer) -> None:
        """End it, or send its notification, if its time has come."""
        if transfer.cancelled or transfer.error:
            transfer.chunks.clear()
        if transfer.chunks or transfer.under_way or (not self.ready and not transfer.cancelled):
            return
        if transfer.notification is None or transfer.notifying or transfer.cancelled or transfer.error:
            self._end(transfer)
            return
        transfer.notifying = True
        self._start(transfer, partial(self.wire.send, self.connection, self._note(transfer.notification)))
        if not transfer.under_way:
            self._end(transfer)

    def _post(self) -> bool:
        """Returns whether something was posted."""
        posted = False
        if not self.ready:
            return False
        until = time.perf_counter() + POST_FOR
        for transfer in self._queue:
            while transfer.wants:
                rows = transfer.chunks[0]
                # Of a transfer in several chunks each counts as a full one.
                size = min(transfer.size, self.wire.chunk_bytes)
                if not self._fits(len(rows), size) or (posted and time.perf_counter() > until):
                    self.waits = True
                    return posted
                posted = True
                transfer.chunks.popleft()
                self.counters.descriptors += len(rows)
                post = partial(self.wire.post, self.connection, rows)
                alone = not transfer.chunks and not transfer.under_way
                if alone and transfer.notification is not None and self.wire.carries_notes:
                    # All that is left to be written: the library sends the note behind it, which spares a look at the end.
                    transfer.notifying = True
                    post = partial(post, self._note(transfer.notification))
                self._start(transfer, post, len(rows), size)
        return posted

    def _fits(self, rows: int, size: int) -> bool:
        """The window is as many rows and bytes as `wire.window` full chunks have, so that a stream of small transfers does not
        wait for looks, and a cancelled one waits for no more than that."""
        window = self.wire.window
        return (
            len(self._operations) < MOST_UNDER_WAY
            and self._rows + rows <= window * self.wire.chunk_rows
            and self._bytes + size <= window * self.wire.chunk_bytes
        )

    def _start(self, transfer: Transfer | None, begin: Callable[[], Any], rows: int = 0, size: int = 0) -> None:
        try:
            handle = begin()
            if not self.wire.finished(handle):
                self._operations.append(Operation(handle, transfer, rows, size))
                self._rows += rows
                self._bytes += size
                if transfer is None:
                    self._probing = True
                else:
                    transfer.under_way += 1
            elif transfer is None:
                self._answered()
        except PeerDied:
            raise
        except TransportError as error:
            if transfer is None:
                raise PeerDied(f"{self.peer.name!r} does not answer: {error}") from error
            transfer.error = error
            self._probed = 0.0

    def _probe(self) -> None:
        now = time.monotonic()
        if not self._probing and now - self._probed >= PROBE_EVERY:
            self._probed = now
            self._start(None, partial(self.wire.probe, self.connection, self._note(None)))

    def _note(self, payload: bytes | None) -> bytes:
        return msgspec.msgpack.encode(Envelope(self.epoch, self.peer.epoch, payload))

    def _end(self, transfer: Transfer) -> None:
        self._queue.remove(transfer)
        transfer.chunks.clear()
        status: Literal["done", "cancelled", "failed"]
        if transfer.error:
            status = "failed"
            self.counters.failed += 1
        elif transfer.cancelled and not transfer.notifying:
            status = "cancelled"
            self.counters.cancelled += 1
        else:
            status = "done"
            self.counters.done += 1
            self.counters.bytes += transfer.size
        self.tell(TransferDone(transfer.number, self.peer, status, transfer.size, transfer.error))
