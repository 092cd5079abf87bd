"""Endpoints of this process by epoch; writing is `memmove`."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ...core.transport import PeerDied, TransportError, WriteRefused

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...transfer.wire import Address, Region

_open: dict[int, LoopbackWire] = {}


class LoopbackWire:
    """A `Wire`. An endpoint's lock is held while its memory is written, so that nothing lands after its `close`."""

    kind = "loopback"
    chunk_bytes = 4 * 1024 * 1024
    chunk_rows = 1024
    quick_bytes = 256 * 1024
    window = 2
    carries_notes = False
    revokes = True

    def __init__(self) -> None:
        self._epoch = 0
        self._name = ""
        self._lock = threading.Lock()
        self._inbox: deque[bytes] = deque()
        self._tensors: Sequence[Tensor] = ()
        self._regions: Sequence[Region] = ()

    def open(self, name: str, epoch: int, tensors: Sequence[Tensor], regions: Sequence[Region]) -> bytes:
        if any(tensor.device.type != "cpu" for tensor in tensors):
            raise TransportError("The loopback transport copies memory of the CPU only.", fix="Choose another transport.")
        self._tensors, self._regions = tensors, regions
        self._name, self._epoch = name, epoch
        self._inbox.clear()
        _open[epoch] = self
        return b""

    def lent(self) -> AbstractContextManager[object]:
        return nullcontext()

    def connect(self, address: Address) -> tuple[str, int]:
        self._target((address.name, address.epoch))
        return address.name, address.epoch

    def post(self, connection: tuple[str, int], rows: np.ndarray, note: bytes | None = None) -> None:
        target = self._target(connection)
        with target._lock:
            if target._epoch != connection[1]:
                raise PeerDied(f"{connection[0]!r} closed.")
            spans = [(region.address, region.address + region.size) for region in target._regions]
            for source, destination, length in rows.tolist():
                if not any(start <= destination and destination + length <= end for start, end in spans):
                    raise WriteRefused(f"{connection[0]!r} registered no {length} bytes at {destination:#x}.")
                ctypes.memmove(destination, source, length)

    def send(self, connection: tuple[str, int], note: bytes) -> None:
        target = self._target(connection)
        with target._lock:
            if target._epoch != connection[1]:
                raise PeerDied(f"{connection[0]!r} closed.")
            target._inbox.append(note)

    def probe(self, connection: tuple[str, int], note: bytes) -> None:
        self._target(connection)

    def finished(self, operation: None) -> bool:
        return True

    def abandon(self, operation: None) -> None:
        """Nothing is ever under way."""

    def received(self) -> Iterable[bytes]:
        found = []
        while self._inbox:
            found.append(self._inbox.popleft())
        return found

    def disconnect(self, connection: tuple[str, int]) -> None:
        """Connections are names."""

    def close(self) -> None:
        with self._lock:
            _open.pop(self._epoch, None)
            self._epoch = 0
            self._tensors, self._regions = (), ()

    def _target(self, connection: tuple[str, int]) -> LoopbackWire:
        name, epoch = connection
        target = _open.get(epoch)
        if target is None:
            raise PeerDied(f"{name!r} (epoch {epoch}) is not in this process, or closed.")
        return target
