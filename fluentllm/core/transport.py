"""What a KV transport promises: it writes bytes of one engine's KV pool into another's, and says when they are there.

A transport is made by a plugin (`fluent_kv_transports`) and used by the handoff between prefill and decode. It knows memory,
peers and bytes; pages, layers and requests are the handoff's. Torch-free.

Everything but `register` and `close` returns at once: it leaves work for the transport and tells what came of it by events,
which `poll` hands out. An *endpoint* is one transport with its registered memory; its *epoch* is a number that `register`
draws anew, so an endpoint that restarted, or registered again, is another one, and nothing meant for the old reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol

from .errors import FluentError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .settings import Settings

MAX_NOTIFICATION = 32 * 1024
"""Bytes of the largest notification that every transport takes."""


class TransportError(FluentError):
    """A transport cannot do what it was asked to."""

    status, code = 503, "transport_error"


class PeerDied(TransportError):
    """The peer is gone: its process ended, its connection broke, it registered anew, or it was disconnected."""

    code = "transport_peer_died"


class WriteRefused(TransportError):
    """A write lies outside of what either side registered, or the peer's library refused it."""

    code = "transport_write_refused"


class TransportClosed(TransportError):
    """The transport was closed, or nothing is registered yet."""

    code = "transport_closed"


@dataclass(frozen=True, slots=True)
class TransportSpec:
    """What `supports` is asked about."""

    device: str
    """Where the KV pool lies: `cpu`, `cuda`."""
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class TransportContext:
    """What a transport is made from."""

    name: str
    """Of this endpoint, for logs and errors; peers see it."""
    host: str
    """Address that peers reach us at; where the library can, it listens on no other."""
    settings: Settings
    wake: Callable[[], None]
    """Called, from any thread, when `poll` has something new. Must return at once: set an event, no more."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A remote endpoint that `connect` was given. Of no use any more after its `PeerGone`."""

    number: int
    """Never given twice by one transport."""
    name: str
    epoch: int
    sizes: tuple[int, ...]
    """Bytes of each tensor that it registered."""


@dataclass(frozen=True, slots=True)
class PeerReady:
    """The connection stands."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class TransferDone:
    """A submitted transfer is over; comes exactly once for each, and from then on the transport reads none of its memory."""

    transfer: int
    peer: Peer
    status: Literal["done", "cancelled", "failed"]
    """done: all bytes lie in the peer's memory and the notification is on its way. cancelled: some bytes may have been
    written, no more will be, and no notification was sent. failed: nobody knows; where the peer is frozen rather than dead,
    bytes and notification may even come later, so a failed transfer is no proof that its target pages are drained."""
    size: int
    """Bytes it would have written, or has."""
    error: TransportError | None = None
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class Notified:
    """A peer's notification: every byte of the transfer it belongs to is in our memory."""

    peer: Peer
    payload: bytes


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The last event of a peer: our memory is not read for it any more, and none of its notifications is delivered.

    It says nothing of what the peer may still write into *our* memory; see `KVTransport.revokes`.
    """

    peer: Peer
    error: TransportError | None
    """None after `disconnect`."""


TransportEvent = PeerReady | TransferDone | Notified | PeerGone


@dataclass(slots=True)
class TransportCounters:
    """Since the transport was made."""

    transfers: int = 0
    """Submitted."""
    done: int = 0
    cancelled: int = 0
    failed: int = 0
    bytes: int = 0
    """Of transfers that are done."""
    descriptors: int = 0
    """Writes given to the library."""
    notified: int = 0
    """Notifications delivered to `poll`."""
    stale: int = 0
    """Dropped: meant for an earlier epoch of ours, or from an endpoint that is not connected."""
    malformed: int = 0
    """Dropped: not from a FluentLLM transport."""
    peers_lost: int = 0
    other: dict[str, int] = field(default_factory=dict)
    """What a transport counts beyond this."""

    def as_dict(self) -> Mapping[str, int]:
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "other"}
        return {**own, **self.other}


class KVTransport(Protocol):
    """One endpoint. All methods may be called from any thread; two calls of `register` or `close` may not overlap."""

    @property
    def epoch(self) -> int:
        """Drawn by the last `register`, 1 … 2⁶³ - 1; 0 before."""
        ...

    @property
    def revokes(self) -> bool:
        """Whether `register` and `close` stop what peers write into the memory that was registered before, even peers that
        are alive and do not cooperate. Where this is False (a peer on this machine copies through the kernel, or from GPU to
        GPU) only the end of either process does, and quarantined pages stay so until their writer answers."""
        ...

    @property
    def counters(self) -> TransportCounters: ...

    def register(self, tensors: Sequence[Tensor]) -> int:
        """Offer the memory of `tensors` (contiguous, all on one device) to peers, in place of what was registered before.

        Offsets in writes count bytes over these tensors, one after another in this order without gaps. Ends every connection
        (their `PeerGone` events come), so peers must be given the new `metadata`. Returns the new epoch. Blocks, up to
        seconds: for start and for recovery. Raises `TransportError`."""
        ...

    def metadata(self) -> bytes:
        """What a peer's `connect` needs, at most 64 KiB; it holds addresses, so send it over authenticated channels only.
        Valid until the next `register`. Raises `TransportClosed` before the first."""
        ...

    def connect(self, metadata: bytes) -> Peer:
        """Take up a connection; `PeerReady` follows, or `PeerGone`. Both ends connect: notifications of an endpoint that
        is not connected here are dropped. The same metadata twice is the same peer. Transfers may be submitted at once.
        Raises `TransportError` for metadata of another kind of transport, or that is none."""
        ...

    def submit(self, peer: Peer, writes: np.ndarray, notification: bytes | None = None) -> int:
        """Write, then notify. Returns the transfer's number; `TransferDone` follows.

        writes: int64 [N, 3] rows (local offset, remote offset, length), bytes; N = 0 and lengths of 0 are fine. Their order
        means nothing; remote ranges that overlap are the caller's mistake. The local memory must stay as it is until
        `TransferDone`. The peer gets the notification (at most `MAX_NOTIFICATION` bytes) once all bytes are in its memory.
        Transfers to one peer start in order, but may end, and notify, in another.

        Raises `WriteRefused` for a row outside of what either side registered or across the border of two tensors (nothing
        is written then), `PeerDied` for a peer that is gone, `TransportClosed`."""
        ...

    def cancel(self, transfer: int) -> None:
        """Write no more of it than is under way. Its `TransferDone` still follows, as cancelled, or as done where it was too
        late. A number that is over, or never was, is ignored."""
        ...

    def disconnect(self, peer: Peer) -> None:
        """Cancel all transfers to the peer and forget it. `PeerGone` follows when nothing is under way to it any more."""
        ...

    def expect(self, handoffs: int) -> None:
        """How many handoffs are open. Above 0, the transport attends to the network eagerly; else it may save the CPU and
        notice what comes about a millisecond later."""
        ...

    def poll(self) -> list[TransportEvent]:
        """Events since the last call, in order."""
        ...

    def close(self) -> None:
        """Stop everything, deregister the memory, let go of it. Blocks, up to seconds. Twice is fine."""
        ...
