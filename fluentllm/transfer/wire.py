"""What a transfer library must do for `PolledTransport` to make a KV transport of it.

A wire is driven by one thread at a time: the one that opened it, or one that it is lent to for a moment. It may be slow where
it says so, never anywhere else; it keeps no state machine of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec import Struct

from ..core.transport import TransportError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EPOCH_LIMIT = 2**63
MAX_METADATA = 64 * 1024


class Region(Struct, frozen=True, array_like=True):
    """One registered tensor."""

    address: int
    size: int
    """Bytes."""
    device: int
    """Number of the GPU; 0 on a CPU."""


class Address(Struct, frozen=True, array_like=True, tag="fluent-kv", forbid_unknown_fields=True):
    """The metadata of an endpoint."""

    kind: str
    """Name of the transport."""
    name: str
    epoch: int
    memory: str
    """`cpu`, `cuda`."""
    regions: list[Region]
    wire: bytes
    """What the library itself needs."""


class Envelope(Struct, frozen=True, array_like=True, tag="fluent-kv-note", forbid_unknown_fields=True):
    """A notification on the wire."""

    source: int
    """Epoch of the sender."""
    target: int
    """Epoch that it is meant for."""
    payload: bytes | None
    """None: a sign of life."""


class Wire(Protocol):
    """A handle of a connection and of an operation is whatever the library has. Everything raises `PeerDied` where the peer
    is gone, and another `TransportError` where the operation failed for a reason of its own."""

    kind: str
    chunk_rows: int
    window: int
    """Full chunks under way to one peer, or as many rows and bytes in smaller posts."""
    carries_notes: bool
    """Does `post` take a note?"""

    @property
    def chunk_bytes(self) -> int:
        """The most that one `post` is given, with `chunk_rows`, so that cancelling waits for no more."""
        ...

    @property
    def quick_bytes(self) -> int:
        """A `post` of few rows that copies no more than this takes no longer than waking a thread."""
        ...

    @property
    def revokes(self) -> bool:
        """See `KVTransport.revokes`."""
        ...

    def open(self, name: str, epoch: int, tensors: Sequence[Tensor], regions: Sequence[Region]) -> bytes:
        """Register the memory, start listening. May take seconds. Only called when closed. Returns `Address.wire`."""
        ...

    def lent(self) -> AbstractContextManager[object]:
        """Held by another thread than the one that opened it around `post`, `send`, `probe`, `finished` and `abandon`."""
        ...

    def connect(self, address: Address) -> Any:
        """May take 100 ms. Returns a connection."""
        ...

    def post(self, connection: Any, rows: np.ndarray, note: bytes | None = None) -> Any:
        """Start to write rows (local address, remote address, length), uint64 [N ≥ 1, 3], none empty. A note, which is given
        only where `carries_notes`, reaches the peer's `received` when all of them are written. Returns an operation."""
        ...

    def send(self, connection: Any, note: bytes) -> Any:
        """Start to deliver a note to the peer's `received`. Returns an operation."""
        ...

    def probe(self, connection: Any, note: bytes) -> Any:
        """Start an operation that fails if the peer is gone; it may send it the note."""
        ...

    def finished(self, operation: Any) -> bool:
        """Whether it is over: for a `post`, whether the bytes are in the peer's memory. Not asked again after True or an
        error."""
        ...

    def abandon(self, operation: Any) -> None:
        """Forget an operation of a connection that is about to be dropped."""
        ...

    def received(self) -> Iterable[bytes]:
        """Notes that have come; also lets the library make progress."""
        ...

    def disconnect(self, connection: Any) -> None:
        """Drop the connection, cutting off what is under way on it."""
        ...

    def close(self) -> None:
        """Deregister and stop listening. May take seconds. Twice is fine."""
        ...


def regions_of(tensors: Sequence[Tensor]) -> list[Region]:
    """Where the tensors lie. Raises `TransportError` unless they are contiguous and on one device."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise TransportError(
            f"The memory to register lies on {sorted(map(str, devices)) or 'no device'}.", fix="Register tensors of one device."
        )
    [device] = devices
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise TransportError(
                f"A tensor to register, {list(tensor.shape)} with strides {list(tensor.stride())}, is not contiguous.",
                fix="Register the whole tensor, not a view of it.",
            )
    index = device.index or 0
    return [Region(tensor.data_ptr(), tensor.numel() * tensor.element_size(), index) for tensor in tensors]


_address = msgspec.msgpack.Decoder(Address)


def read_address(metadata: bytes, kind: str) -> Address:
    """Raises `TransportError` for what is no metadata, or another transport's."""
    try:
        if len(metadata) > MAX_METADATA:
            raise ValueError(f"{len(metadata):,} bytes are more than {MAX_METADATA:,}")
        address = _address.decode(metadata)
        if not 0 < address.epoch < EPOCH_LIMIT or any(r.size < 0 or r.address < 0 for r in address.regions):
            raise ValueError("an epoch, address or size is out of range")
    except (ValueError, msgspec.DecodeError) as error:
        raise TransportError(f"A peer's transport metadata cannot be read: {error}.") from error
    if address.kind != kind:
        raise TransportError(
            f"The peer {address.name!r} uses the transport {address.kind!r}, this engine {kind!r}.",
            fix="Set the same transport on both sides.",
        )
    return address
