"""What both directions share: the transport, the control connections on top of it, and who hears what comes.

A *connection* is a link and the transport's peer behind it; it begins when both sides have described themselves and their
layouts fit, and ends with either.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigError, FluentError
from ...core.transport import Notified, Peer, PeerGone, TransferDone, TransportContext
from ...transfer.faults import FaultyTransport
from ...transfer.frames import MIN_KEY
from ...transfer.layout import layout_of, memory_of
from ...transfer.memory import RegisteredMemory
from ...transfer.messages import Describe, Group
from ...transfer.slices import slices_of, sources_of
from .pacing import Pacing

if TYPE_CHECKING:
    import numpy as np

    from ...core.handoff import HandoffContext, Host
    from ...core.transport import KVTransport
    from ...transfer.layout import KVLayout
    from ...transfer.link import Link
    from . import LayerwiseSettings

log = logging.getLogger("fluentllm.handoff")


@dataclass(slots=True, eq=False)
class Connection:
    link: Link
    peer: Peer
    layout: KVLayout
    """The other side's."""
    epoch: int
    """Of the other side's transport: another life has another."""


class Exchange:
    """One engine's transport and connections."""

    host: Host
    transport: KVTransport
    loop: asyncio.AbstractEventLoop

    def __init__(self, context: HandoffContext, settings: LayerwiseSettings) -> None:
        self.settings = settings
        self.context = context
        self.key = _key(settings)
        self.name = f"{context.role}-{secrets.token_hex(4)}"
        states = list(context.page_states)
        self.layout = layout_of(
            context.pool,
            context.model,
            draft_layers=context.draft_layers,
            heads=context.kv_heads,
            tp_size=context.tp_size,
            tp_rank=context.tp_rank,
            proposer=context.speculative,
            page_states=tuple(state[0].numel() * state.element_size() for state in states),
        )
        self.tensors = [*memory_of(context.pool), *states]
        self.memory = RegisteredMemory(self.layout, self.tensors)
        self.pacing = Pacing(self.layout.layers)
        self.counters: Counter[str] = Counter()
        self.connections: dict[int, Connection] = {}
        """By the number of the transport's peer."""
        self.on_group: Callable[[Connection, Group], None] = lambda connection, group: None
        self.on_transfer: Callable[[TransferDone], None] = lambda done: None
        self.on_gone: Callable[[Connection, FluentError], None] = lambda connection, error: None
        self._closed = False

    # --------------------------------------------------------------------------------------------------------- life
    def start(self, host: Host) -> None:
        self.host = host
        self.loop = asyncio.get_running_loop()
        context = TransportContext(self.name, self.settings.host, self.context.settings, self._wake)
        self.transport = self.context.make_transport(context)
        if self.settings.faults is not None:
            self.transport = FaultyTransport(self.transport, self.settings.faults, self._wake)
        self.transport.register(self.tensors)

    def close(self) -> None:
        self._closed = True
        for connection in list(self.connections.values()):
            connection.link.close()
        self.connections.clear()
        if hasattr(self, "transport"):
            self.transport.close()

    @property
    def epoch(self) -> int:
        return self.transport.epoch

    async def register_again(self) -> None:
        """Revoke what peers may still write; every connection ends."""
        await asyncio.to_thread(self.transport.register, self.tensors)
        self.counters["registrations"] += 1
        for connection in list(self.connections.values()):
            self.end(connection, FluentError("This engine has registered its memory anew."))

    # -------------------------------------------------------------------------------------------------- connections
    def describe(self) -> Describe:
        return Describe(engine=self.name, epoch=self.epoch, layout=self.layout, transport=self.transport.metadata())

    def connect(self, link: Link, other: Describe) -> Connection:
        """Layouts have been compared. Raises `TransportError`."""
        peer = self.transport.connect(other.transport)
        connection = Connection(link, peer, other.layout, other.epoch)
        self.connections[peer.number] = connection
        return connection

    def end(self, connection: Connection, error: FluentError) -> None:
        """Close the link, drop the transport's peer, and let the handoffs know. Once."""
        if self.connections.get(connection.peer.number) is not connection:
            return
        del self.connections[connection.peer.number]
        connection.link.close()
        self.transport.disconnect(connection.peer)
        self.counters["connections_lost"] += 1
        if not self._closed:
            log.info("handoff: %s is gone: %s", connection.link.name, error)
            self.on_gone(connection, error)

    # ------------------------------------------------------------------------------------------------------- events
    def submit(self, connection: Connection, writes: np.ndarray, group: Group) -> int:
        """Raises `TransportError`."""
        return self.transport.submit(connection.peer, writes, connection.link.seal(group))

    def _wake(self) -> None:
        if not self._closed and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._poll)

    def _poll(self) -> None:
        if self._closed:
            return
        for event in self.transport.poll():
            if isinstance(event, TransferDone):
                self.on_transfer(event)
            elif isinstance(event, Notified):
                self._notified(event)
            elif isinstance(event, PeerGone):
                connection = self.connections.get(event.peer.number)
                if connection is not None:
                    self.end(connection, event.error or FluentError("The transport has dropped the peer."))

    def _notified(self, event: Notified) -> None:
        connection = self.connections.get(event.peer.number)
        if connection is None:
            self.counters["notes_stale"] += 1
            return
        try:
            message = connection.link.open_group(event.payload)
        except FluentError as error:
            # Of a transport's notification anybody on the data network may be the author: it is dropped, no more.
            self.counters[f"notes_{error.code.removeprefix('frame_')}"] += 1
            return
        if isinstance(message, Group):
            self.on_group(connection, message)

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
        """As `loop.call_later`, but nothing is called once this is closed."""
        return self.loop.call_later(seconds, self._fire, call, arguments)

    def _fire(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self._closed:
            call(*arguments)

    def checksum(self, connection: Connection, pages: Sequence[int], layers: range, tokens: int, *, sent: bool) -> int:
        """Of what goes to the connection's other side, or came from there: our part of `pages`, the last of `tokens` tokens."""
        source, target = (self.layout, connection.layout) if sent else (connection.layout, self.layout)
        parts = slices_of(source, target)
        firsts = [part.source_head if sent else part.target_head for part in parts]
        heads = [range(first, first + part.heads) for first, part in zip(firsts, parts, strict=True)]
        states = layers.stop == source.layers and sources_of(source, target)[0] == source.tp_rank
        return self.memory.checksum(pages, layers, tokens, states, heads)


def _key(settings: LayerwiseSettings) -> bytes:
    key = (settings.key or "").encode()
    if len(key) < MIN_KEY:
        found = "not set" if not key else f"{len(key)} characters long"
        raise ConfigError(
            f"plugins.kv_layerwise.key is {found}: prefill and decode engines need a shared key.",
            fix="Give all of them the same one, of at least 16 characters, such as `openssl rand -hex 32` prints.",
            param="plugins.kv_layerwise.key",
        )
    return key
