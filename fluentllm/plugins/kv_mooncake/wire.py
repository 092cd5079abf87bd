"""One Mooncake transfer engine; a new one for each registration, so that an old address leads nowhere.

Writes are asynchronous and polled. Notifications and probes block inside the library, for a minute if the peer is frozen, so
each connection has a thread for them. A notification goes with a write of at least one byte, so every endpoint registers a
mailbox.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.transport import PeerDied, TransportError, WriteRefused
from .lane import Lane

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...transfer.wire import Address, Region
    from . import MooncakeSettings

MAILBOX = 64
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Connection:
    session: str
    """host:port of the peer's engine."""
    mailbox: int
    """Address in the peer's memory."""
    thread: Lane


class MooncakeWire:
    """A `Wire`. An operation is a batch id, or a Future of what blocks."""

    kind = "mooncake"
    chunk_bytes = 16 * 1024 * 1024
    # Over TCP it rejects batches of more than about 2048 rows.
    chunk_rows = 1024
    window = 2
    quick_bytes = chunk_bytes  # its own threads copy
    carries_notes = False
    # The receiving side checks every write against what is registered now.
    revokes = True

    def __init__(self, host: str, settings: MooncakeSettings) -> None:
        # Read when the library loads.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "3")
        os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "65535")
        try:
            import mooncake.engine as library
        except ImportError as error:
            raise TransportError(
                f"Mooncake cannot be loaded: {error}.",
                fix="Type pip install 'fluentllm[mooncake]'; it needs the system's libibverbs and libnuma.",
            ) from error
        self._library = library
        self._host = host
        self._settings = settings
        self._engine: Any = None
        self._mailbox: Tensor | None = None
        self._tensors: Sequence[Tensor] = ()

    def open(self, name: str, epoch: int, tensors: Sequence[Tensor], regions: Sequence[Region]) -> bytes:
        import torch

        engine = self._library.TransferEngine()
        if engine.initialize(self._host, "P2PHANDSHAKE", self._settings.protocol, self._settings.devices) != 0:
            raise TransportError(
                f"Mooncake cannot start on {self._host} with {self._settings.protocol}.",
                fix="Check that the address is this machine's, and plugins.kv_mooncake.",
            )
        self._mailbox = torch.zeros(2 * MAILBOX, dtype=torch.uint8)
        filled = [region for region in regions if region.size]
        addresses = [self._mailbox.data_ptr(), *(region.address for region in filled)]
        sizes = [2 * MAILBOX, *(region.size for region in filled)]
        if engine.batch_register_memory(addresses, sizes) != 0:
            raise TransportError(f"Mooncake cannot register {sum(sizes):,} bytes.")
        self._engine, self._tensors = engine, tensors
        return f"{self._host}:{engine.get_rpc_port()}:{self._mailbox.data_ptr()}".encode()

    def lent(self) -> AbstractContextManager[object]:
        return nullcontext()

    def connect(self, address: Address) -> Connection:
        try:
            session, _, mailbox = address.wire.decode().rpartition(":")
            connection = Connection(session, int(mailbox), Lane())
        except ValueError as error:
            raise TransportError(f"{address.name!r} sent an address that Mooncake has no use for.") from error
        return connection

    def post(self, connection: Connection, rows: np.ndarray, note: bytes | None = None) -> int:
        ours, theirs, lengths = rows.T.tolist()
        batch: int = self._engine.batch_transfer_async_write(connection.session, ours, theirs, lengths)
        if batch in (0, -1):
            raise WriteRefused(f"Mooncake refuses a batch of {len(rows)} writes to {connection.session}.")
        return batch

    def send(self, connection: Connection, note: bytes) -> Future[None]:
        return connection.thread.submit(self._send, self._engine, self._mailbox, connection, note)

    def probe(self, connection: Connection, note: bytes) -> Future[None]:
        return connection.thread.submit(self._probe, self._engine, connection)

    def finished(self, operation: int | Future[None]) -> bool:
        if isinstance(operation, Future):
            if operation.done():
                operation.result()
                return True
            return False
        # Forgotten by the library once it has answered anything but 0.
        state: int = self._engine.transfer_check_status(operation)
        if state < 0:
            raise WriteRefused("Mooncake says that a write failed: the peer is gone, or refused it.")
        return state != 0

    def abandon(self, operation: int | Future[None]) -> None:
        if isinstance(operation, Future):
            operation.cancel()

    def received(self) -> Iterable[bytes]:
        return [_bytes(note.msg) for note in self._engine.get_notifies()]

    def disconnect(self, connection: Connection) -> None:
        connection.thread.end()

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        addresses = [tensor.data_ptr() for tensor in self._tensors if tensor.numel()]
        if self._mailbox is not None:
            addresses.append(self._mailbox.data_ptr())
        engine.batch_unregister_memory(addresses)
        # The last reference: its end closes the listening socket.
        del engine
        self._tensors, self._mailbox = (), None

    def _send(self, engine: Any, mailbox: Tensor, connection: Connection, note: bytes) -> None:
        # The library's strings are UTF-8: each byte goes as the character of its number.
        notify = self._library.TransferNotify("", note.decode("latin-1"))
        source = mailbox.data_ptr() + MAILBOX
        write = self._library.TransferOpcode.Write
        if engine.batch_transfer_sync(connection.session, [source], [connection.mailbox], [1], write, notify) != 0:
            self._probe(engine, connection)
            raise WriteRefused(f"Mooncake could not notify {connection.session}.")

    @staticmethod
    def _probe(engine: Any, connection: Connection) -> None:
        # The first call looks up the peer's memory, which blocks; later writes find it.
        if engine.get_first_buffer_address(connection.session) <= 0 or engine.send_probe(connection.session) != 0:
            raise PeerDied(f"Mooncake's peer {connection.session} does not answer.")


def _bytes(text: str) -> bytes:
    """What `_send` made text of; empty for what is none of ours."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return b""
