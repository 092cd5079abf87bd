"""A KV transport out of a transfer library: one thread that drives a `Wire`, and the state machine that all wires share.

`submit` cuts a transfer into chunks and queues it; the thread keeps a window of chunks under way to every peer, in order,
sends the notification when the last has landed (or lets the library, behind a lone chunk), and turns what the library says
into events. So the engine's loop never waits for the library, a frozen peer holds up no other, and a cancelled transfer is
over after the chunks under way. A transfer of few rows and bytes is posted by `submit` itself while the thread naps: handing it
over would take as long as writing it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from ..core.transport import (
    MAX_NOTIFICATION,
    Notified,
    Peer,
    PeerDied,
    PeerGone,
    TransportClosed,
    TransportCounters,
    TransportError,
    TransportEvent,
    WriteRefused,
)
from .channel import Channel, Transfer
from .naps import BUSY_NAP, EAGER_NAP, IDLE_NAP, Bell, keep_time, moving_nap
from .rows import AddressMap, addressed, cut
from .wire import EPOCH_LIMIT, MAX_METADATA, Address, Envelope, Wire, read_address, regions_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.transport import TransportContext

log = logging.getLogger("fluentllm.transfer")

BUSY_CALL = 20e-6
"""Seconds in the library that mean that it was moving bytes: look again at once."""
BUSY_FOR = 0.01
"""Seconds after the last sign of traffic for which it counts as moving."""
FEW_ROWS = 16
"""The caller of `submit` posts up to so many itself. NIXL took 34 µs for one and 1.5 µs for each row more on a CPU."""


class PolledTransport:
    """`KVTransport` on a wire. The thread starts with the first `register` and ends with `close`."""

    def __init__(self, context: TransportContext, wire: Wire) -> None:
        self._name = context.name
        self._wake = context.wake
        self._wire = wire
        self.counters = TransportCounters()
        self._epoch = 0
        self._metadata: bytes | None = None
        self._map = AddressMap([])
        self._closed = False
        self._expected = 0
        # Peers and numbers are shared between callers and the thread.
        self._lock = threading.Lock()
        self._peers: dict[int, tuple[Peer, AddressMap]] = {}
        self._numbers = 0
        self._transfers = 0
        self._events: deque[TransportEvent] = deque()
        self._told = False
        self._busy = False
        self._work: deque[Callable[[], None]] = deque()
        self._bell = Bell()
        self._thread: threading.Thread | None = None
        # Channels and the wire are whose who holds this: the thread in its turns, a caller of `submit` between them.
        self._driving = threading.Lock()
        self._handed = 0.0
        """When a transfer was handed in last."""
        self._channels: dict[int, Channel] = {}
        self._by_epoch: dict[int, Channel] = {}
        self._decoder = msgspec.msgpack.Decoder(Envelope)

    # ------------------------------------------------------------------------------------------------------- any thread
    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def revokes(self) -> bool:
        return self._wire.revokes

    def register(self, tensors: Sequence[Tensor]) -> int:
        if self._closed:
            raise TransportClosed(f"The transport {self._name!r} is closed.")
        tensors = list(tensors)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"kv-{self._wire.kind}", daemon=True)
            self._thread.start()
        self._call(lambda: self._open(tensors))
        return self._epoch

    def metadata(self) -> bytes:
        if self._metadata is None:
            raise TransportClosed(f"The transport {self._name!r} has registered nothing.", fix="Call register first.")
        return self._metadata

    def connect(self, metadata: bytes) -> Peer:
        address = read_address(metadata, self._wire.kind)
        with self._lock:
            self._ready()
            for peer, _ in self._peers.values():
                if peer.epoch == address.epoch:
                    return peer
            self._numbers += 1
            remote = AddressMap(address.regions)
            peer = Peer(self._numbers, address.name, address.epoch, remote.sizes)
            self._peers[peer.number] = (peer, remote)
            self._do(lambda: self._connect(peer, address))
        return peer

    def submit(self, peer: Peer, writes: np.ndarray, notification: bytes | None = None) -> int:
        if notification is not None and len(notification) > MAX_NOTIFICATION:
            raise WriteRefused(f"A notification has {len(notification):,} bytes; the most is {MAX_NOTIFICATION:,}.")
        with self._lock:
            self._ready()
            known, remote = self._peers.get(peer.number, (None, None))
            if known is not peer or remote is None:
                raise PeerDied(f"{peer.name!r} (epoch {peer.epoch}) is not connected.")
            rows, size = addressed(writes, self._map, remote, (f"this end, {self._name!r},", f"the peer {peer.name!r}"))
            self._transfers += 1
            chunks = deque(cut(rows, self._wire.chunk_bytes, self._wire.chunk_rows))
            transfer = Transfer(self._transfers, peer, size, chunks, notification)
            self.counters.transfers += 1
            quick = len(chunks) <= 1 and len(rows) <= FEW_ROWS and size <= self._wire.quick_bytes
            here = quick and self._post_here(transfer)
            if not here:
                self._do(lambda: self._channels[peer.number].add(transfer))
        if here:
            self._pass_on()
        return transfer.number

    def _post_here(self, transfer: Transfer) -> bool:
        """Let the calling thread post it, if nothing is to be done before it. Returns whether it did."""
        if not self._driving.acquire(blocking=False):
            return False
        try:
            channel = self._channels.get(transfer.peer.number)
            if self._work or channel is None or not channel.ready or channel.waits:
                return False
            with self._wire.lent():
                channel.add(transfer)
                channel.step(look=False)  # the thread does, and in a row of transfers each would look at all before it
            self._handed = time.monotonic()
        finally:
            self._driving.release()
        self._bell.ring()  # for the thread to look for its end
        return True

    def cancel(self, transfer: int) -> None:
        def everywhere() -> None:
            for channel in list(self._channels.values()):
                channel.cancel(transfer)

        self._do(everywhere)

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            if self._peers.pop(peer.number, None) is not None:
                self._do(lambda: self._leave(peer))

    def expect(self, handoffs: int) -> None:
        self._expected = handoffs
        self._bell.ring()

    def poll(self) -> list[TransportEvent]:
        found = []
        while self._events:
            found.append(self._events.popleft())
        return found

    def close(self) -> None:
        if self._thread is not None and not self._closed:
            self._call(self._shut)
            self._thread.join()
        self._closed = True
        self._metadata = None

    def _ready(self) -> None:
        if self._closed or not self._epoch:
            state = "is closed" if self._closed else "has registered nothing"
            raise TransportClosed(f"The transport {self._name!r} {state}.")

    def _do(self, work: Callable[[], Any]) -> None:
        self._work.append(work)
        self._bell.ring()

    def _call(self, work: Callable[[], None]) -> None:
        """Let the thread do it, and wait."""
        result: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(None)

        self._do(run)
        while True:
            try:
                return result.result(timeout=1)
            except TimeoutError:
                if self._thread is None or not self._thread.is_alive():
                    raise TransportClosed(f"The transport {self._name!r} broke.") from None

    # -------------------------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        keep_time()
        moved = time.monotonic()
        while not self._closed:
            try:
                with self._driving:
                    active = self._turn()
            except Exception as error:
                self._break(error)
                return
            self._pass_on()
            now = time.monotonic()
            if active:
                moved, nap = now, moving_nap(now - self._handed)
            else:
                nap = BUSY_NAP if now - moved < BUSY_FOR else EAGER_NAP if self._expected else IDLE_NAP
            if not self._work and not self._busy:
                self._bell.wait(nap)

    def _turn(self) -> bool:
        """One look at everything. Returns whether something moves."""
        active = bool(self._work)
        if active:
            self._handed = time.monotonic()
        while self._work:
            self._work.popleft()()
        if not self._epoch or self._closed:
            return active
        hurry = False
        for channel in list(self._channels.values()):
            active |= channel.step()
            hurry |= channel.hurry
            if channel.gone:
                self._forget(channel)
        self._pass_on()  # before the library takes its time
        started = time.perf_counter()
        notes = self._wire.received()
        # Libraries do not say that a peer's bytes came, but the call that takes them in lasts longer than an idle one.
        taking = time.perf_counter() - started > BUSY_CALL
        active |= taking
        self._busy = taking or hurry
        for note in notes:
            active |= self._deliver(note)
        return active

    def _pass_on(self) -> None:
        """Wake whom the last events wait for."""
        if self._told:
            self._told = False
            self._wake()

    def _deliver(self, note: bytes) -> bool:
        """Whether it was a notification."""
        try:
            envelope = self._decoder.decode(note)
        except msgspec.DecodeError:
            self.counters.malformed += 1
            return False
        channel = self._by_epoch.get(envelope.source)
        if envelope.target != self._epoch or channel is None:
            self.counters.stale += envelope.payload is not None
            return False
        if envelope.payload is None:
            return False
        self.counters.notified += 1
        self._tell(Notified(channel.peer, envelope.payload))
        return True

    def _open(self, tensors: Sequence[Tensor]) -> None:
        regions = regions_of(tensors)
        self._drop_all("this end registers anew")
        self._wire.close()
        epoch = secrets.randbelow(EPOCH_LIMIT - 1) + 1
        wire = self._wire.open(self._name, epoch, tensors, regions)
        address = Address(self._wire.kind, self._name, epoch, tensors[0].device.type, regions, wire)
        metadata = msgspec.msgpack.encode(address)
        if len(metadata) > MAX_METADATA:
            raise TransportError(f"The metadata of {len(regions)} tensors has {len(metadata):,} bytes.", fix="Register fewer.")
        with self._lock:
            self._epoch, self._map, self._metadata = epoch, AddressMap(regions), metadata

    def _connect(self, peer: Peer, address: Address) -> None:
        channel = Channel(peer, self._wire, self._epoch, self.counters, self._tell)
        self._channels[peer.number] = channel
        try:
            channel.connection = self._wire.connect(address)
        except TransportError as error:
            channel.lose(error)
            return
        self._by_epoch[peer.epoch] = channel

    def _leave(self, peer: Peer) -> None:
        self._channels[peer.number].leave()

    def _forget(self, channel: Channel) -> None:
        """Let go of a channel that is gone."""
        with self._lock:
            self._peers.pop(channel.peer.number, None)
            if self._work:
                return  # a transfer submitted in between needs the channel, to be told that it failed
            del self._channels[channel.peer.number]
        self._let_go(channel)

    def _let_go(self, channel: Channel) -> None:
        if self._by_epoch.get(channel.peer.epoch) is channel:
            del self._by_epoch[channel.peer.epoch]
        if channel.connection is not None:
            self._wire.disconnect(channel.connection)
        if channel.error is not None:
            self.counters.peers_lost += 1
            level = logging.WARNING if self._epoch else logging.DEBUG  # 0 while this end itself ends all connections
            log.log(level, "transport %s: lost %r: %s", self._wire.kind, channel.peer.name, channel.error)
        self._tell(PeerGone(channel.peer, channel.error))

    def _drop_all(self, reason: str) -> None:
        with self._lock:
            self._peers.clear()
            self._epoch, self._metadata = 0, None
            work, self._work = self._work, deque()
        # What callers queued before the peers went: each of their transfers ends with an event.
        for item in work:
            item()
        for channel in self._channels.values():
            channel.lose(PeerDied(f"The connection to {channel.peer.name!r} ended: {reason}."))
            self._let_go(channel)
        self._channels.clear()

    def _break(self, error: Exception) -> None:
        """A bug, here or in the wire: nothing may wait for this thread any more."""
        log.exception("transport %s broke", self._wire.kind, exc_info=error)
        self._drop_all(f"the transport broke: {type(error).__name__}: {error}")
        self._closed = True
        self._wake()

    def _tell(self, event: TransportEvent) -> None:
        self._events.append(event)
        self._told = True

    def _shut(self) -> None:
        self._drop_all("this end closes")
        self._wire.close()
        self._closed = True
        self._wake()
