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
    _queue: deque[Transfer] = field(default_factory=deque)
    """Open transfers, oldest first."""
    _operations: list[tuple[Any, Transfer | None]] = field(default_factory=list)
    """Under way; None: a probe."""
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
        for operation, _ in self._operations:
            self.wire.abandon(operation)
        self._operations.clear()

    def step(self) -> bool:
        """Look at what is under way, end what is over, post what fits. Returns whether anything moves."""
        if self.gone:
            return False
        try:
            self._look()
            self._probe()
            self._post()
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
            if not self._queue and all(transfer is None for _, transfer in self._operations):
                self._drop_operations()
                self.gone = True
            elif time.monotonic() - self._leaving > LEAVE_WITHIN:
                self.lose(PeerDied(f"{self.peer.name!r} kept what was under way to it; its connection was cut."))
        return bool(self._queue)

    def _look(self) -> None:
        for item in self._operations[:]:
            operation, transfer = item
            try:
                if not self.wire.finished(operation):
                    continue
            except PeerDied:
                self._operations.remove(item)
                raise
            except TransportError as error:
                if transfer is None:
                    self._operations.remove(item)
                    raise PeerDied(f"{self.peer.name!r} does not answer: {error}") from error
                transfer.error = transfer.error or error
                # Why it failed is not always told: the next probe says whether the peer is gone.
                self._probed = 0.0
            self._operations.remove(item)
            if transfer is None:
                self._probing = False
                self._answered()
            else:
                transfer.under_way -= 1

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

    def _post(self) -> None:
        if not self.ready:
            return
        for transfer in self._queue:
            if len(self._operations) >= self.wire.window:
                return
            while transfer.wants and len(self._operations) < self.wire.window:
                rows = transfer.chunks.popleft()
                self.counters.descriptors += len(rows)
                post = partial(self.wire.post, self.connection, rows)
                alone = not transfer.chunks and not transfer.under_way
                if alone and transfer.notification is not None and self.wire.carries_notes:
                    # All that is left to be written: the library sends the note behind it, which spares a look at the end.
                    transfer.notifying = True
                    post = partial(post, self._note(transfer.notification))
                self._start(transfer, post)

    def _start(self, transfer: Transfer | None, begin: Callable[[], Any]) -> None:
        try:
            operation = begin()
            if not self.wire.finished(operation):
                self._operations.append((operation, transfer))
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
