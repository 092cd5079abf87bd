"""The decode side: a prompt's KV is asked for, written into pages reserved for it, and checked; then the request decodes.

    waiting → receiving → (arrived) ↘
       ↑ retry, other pages ↓         draining → over
       └──────────────── failed ─────↗   ↘ quarantined (until the memory is registered anew)

A handoff whose tries are used up, or whose peer is left alone by the breaker, becomes an ordinary request: its prompt is
computed here. Pages that a writer may still write to stay leased (`draining`) until it says that it is drained.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import FluentError, InvalidRequest
from ...core.kv.events import encode_tokens
from ...core.types import HandoffReport, TokenLogprob
from ...transfer.messages import Cancel, Drained, Failed, FirstToken, Message, Refuse, Release, Reserve
from .exchange import attempt_of
from .peers import PrefillPeer, address

if TYPE_CHECKING:
    import asyncio

    from ...core.kv.pages import Lease
    from ...core.sequence import Sequence
    from ...transfer.messages import Attempt, Group
    from .exchange import Connection, Exchange
    from .quarantine import Quarantine

log = logging.getLogger("fluentllm.handoff")

GRACE = 0.25
"""Seconds for which notifications may be later than the word that everything was sent."""


@dataclass(slots=True, eq=False)
class Incoming:
    """One handoff."""

    id: str
    sequence: Sequence
    peer: PrefillPeer
    attempts: int = 0
    allowed: bool = False
    """The breaker has let it through; how it goes is to be reported."""
    of: Attempt | None = None
    """The attempt that runs."""
    connection: Connection | None = None
    pages: list[int] = field(default_factory=list)
    lease: Lease | None = None
    covered: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    """[layers, pages]: what has arrived."""
    first: FirstToken | None = None
    drained: bool = False
    received: int = 0
    timer: asyncio.TimerHandle | None = None


class Receiver:
    """All handoffs that come to this engine."""

    def __init__(self, exchange: Exchange, quarantine: Quarantine) -> None:
        self._exchange, self._quarantine = exchange, quarantine
        self._counters = exchange.counters
        self._peers = {address(text): PrefillPeer(exchange, *address(text)) for text in exchange.settings.peers}
        for peer in self._peers.values():
            peer.on_ready, peer.on_failed, peer.on_message = self._ready, self._unreachable, self._message
        self._all: dict[Sequence, Incoming] = {}
        self._receiving: dict[Attempt, Incoming] = {}
        quarantine.receiving = lambda: bool(self._receiving)

    @property
    def open(self) -> int:
        return len(self._all) + self._quarantine.open

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    # ------------------------------------------------------------------------------------------------- from the engine
    def peer_of(self, host: str, port: int) -> PrefillPeer:
        """Raises `InvalidRequest` for an engine that is not configured: else a request could point us anywhere."""
        peer = self._peers.get((host, port))
        if peer is None:
            raise InvalidRequest(
                f"The request names the prefill engine {host}:{port}, which this engine does not know.",
                fix="Add it to plugins.kv_layerwise.peers.",
            )
        if peer.refusal is not None:
            raise peer.refusal
        return peer

    def adopt(self, sequence: Sequence, handoff: str, host: str, port: int) -> None:
        incoming = Incoming(handoff, sequence, self.peer_of(host, port))
        self._all[sequence] = incoming
        self._wait(incoming)

    def decline(self, handoff: str, host: str, port: int) -> None:
        """It is computed here: the prefill engine need not keep it."""
        self._forget(self.peer_of(host, port), handoff)

    def abort(self, sequence: Sequence) -> bool:
        incoming = self._all.pop(sequence, None)
        if incoming is None:
            return False
        self._counters["handoffs_cancelled"] += 1
        if incoming.allowed:
            incoming.peer.breaker.forgo()
        self._end_attempt(incoming, cancel=True)
        self._release_peer(incoming)
        return True

    def turn(self) -> None:
        """Begin what waits, in order, as far as pages go."""
        if len(self._all) > len(self._receiving):
            for incoming in [item for item in self._all.values() if item.of is None]:
                if not self._begin(incoming):
                    break

    # ----------------------------------------------------------------------------------------------------- from peers
    def group(self, connection: Connection, group: Group) -> None:
        incoming = self._receiving.get(group.of)
        if incoming is None or incoming.connection is not connection:
            self._counters["groups_stale"] += 1
            return
        layers = slice(group.first_layer, group.first_layer + group.layer_count)
        pages = slice(group.first_page, group.first_page + group.page_count)
        if layers.stop > incoming.covered.shape[0] or pages.stop > incoming.covered.shape[1]:
            self._failed(incoming, "protocol", "A group lies outside of what was asked for.")
            return
        part = incoming.covered[layers, pages]
        if part.size and part.all():
            self._counters["groups_repeated"] += 1
            return
        if group.checksum is not None and group.checksum != self._checksum(incoming, range(layers.start, layers.stop), pages):
            self._counters["groups_corrupt"] += 1
            self._failed(incoming, "corrupt", "A group's checksum is wrong.")
            return
        part[...] = True
        incoming.received += group.bytes
        self._counters["groups_received"] += 1
        self._check(incoming)

    def gone(self, connection: Connection, error: FluentError) -> None:
        for peer in self._peers.values():
            if peer.connection is connection:
                peer.connection = None
                peer.breaker.failed()
        self._quarantine.gone(connection)
        for incoming in [item for item in self._receiving.values() if item.connection is connection]:
            self._failed(incoming, "connection", str(error), report=False)

    def _message(self, connection: Connection, message: Message) -> None:
        if not isinstance(message, FirstToken | Drained | Failed | Refuse) or message.of is None:
            self._counters["messages_unexpected"] += 1
            return
        of = message.of
        if isinstance(message, Drained):
            self._drained(of, message)
            return
        incoming = self._receiving.get(of)
        if incoming is None:
            self._counters["messages_stale"] += 1
        elif isinstance(message, FirstToken):
            incoming.first = message
            self._check(incoming)
        else:
            # What was refused was never begun.
            incoming.drained |= isinstance(message, Refuse)
            retry = message.code not in ("client_left", "unknown", "prompt")
            self._failed(incoming, message.code, message.reason, retry=retry)

    def _drained(self, of: Attempt, message: Drained) -> None:
        if self._quarantine.drained(of):
            return
        incoming = self._receiving.get(of)
        if incoming is not None:
            incoming.drained = True
            # Notifications come another way, and may be later than this.
            self._time(incoming, GRACE, partial(self._failed, incoming, "lost", "Groups were sent that did not arrive."))

    def _ready(self, peer: PrefillPeer) -> None:
        connection = peer.connection
        while connection is not None and peer.forgotten:
            of = attempt_of(peer.forgotten.popleft(), 0, connection.epoch, self._exchange.epoch)
            connection.link.send(Release(of=of))
        self._exchange.host.wake()

    def _unreachable(self, peer: PrefillPeer, error: FluentError) -> None:
        self._counters["connections_failed"] += 1
        for incoming in [item for item in self._all.values() if item.peer is peer and item.of is None]:
            if peer.refusal is not None:
                self._refuse(incoming, peer.refusal)
            else:
                self._failed(incoming, "unreachable", str(error), report=False)

    # ---------------------------------------------------------------------------------------------------------- inside
    def _wait(self, incoming: Incoming) -> None:
        self._time(incoming, self._exchange.settings.wait_timeout, partial(self._waited, incoming))
        self._exchange.host.wake()

    def _waited(self, incoming: Incoming) -> None:
        self._counters["deadline_wait"] += 1
        self._compute(incoming, "wait")

    def _begin(self, incoming: Incoming) -> bool:
        """Ask for it. False if pages are short."""
        peer, exchange, sequence = incoming.peer, self._exchange, incoming.sequence
        if not incoming.allowed:
            if not peer.breaker.allows():
                self._compute(incoming, "breaker")
                return True
            incoming.allowed = True
        if self._quarantine.full:
            return False
        if peer.connection is None:
            peer.connect()
            return True
        # Who waits for pages in the scheduler goes first: its pages would be taken away from under it else.
        if exchange.host.waiting:
            return False
        lease = exchange.host.expect(sequence, incoming.id)
        if lease is None:
            return False
        held = sequence.published
        pages = sequence.pages[held : exchange.host.kv.pages_for(sequence.prompt_length)]
        incoming.of = attempt_of(incoming.id, incoming.attempts, peer.connection.epoch, exchange.epoch)
        incoming.attempts += 1
        incoming.connection, incoming.pages, incoming.lease = peer.connection, pages, lease
        incoming.covered = np.zeros((exchange.layout.layers, len(pages)), dtype=bool)
        incoming.first, incoming.drained, incoming.received = None, False, 0
        self._receiving[incoming.of] = incoming
        exchange.transport.expect(len(self._receiving))
        timeout = exchange.settings.transfer_timeout
        self._time(incoming, timeout, partial(self._late, incoming))
        peer.connection.link.send(
            Reserve(
                of=incoming.of,
                prompt_tokens=sequence.prompt_length,
                prompt_hash=hashlib.sha256(encode_tokens(sequence.tokens[: sequence.prompt_length])).digest(),
                held_pages=held,
                pages=pages,
                deadline=timeout,
                checksums=exchange.settings.checksums,
            )
        )
        return True

    def _late(self, incoming: Incoming) -> None:
        self._counters["deadline_transfer"] += 1
        self._failed(incoming, "timeout", "It was not complete in time.")

    def _check(self, incoming: Incoming) -> None:
        """Whether everything is there."""
        first = incoming.first
        if first is None or not incoming.covered.all():
            return
        sequence = incoming.sequence
        if sequence.request.params.logprobs is not None and first.logprob is None:
            self._end_attempt(incoming, cancel=False)
            self._compute(incoming, "logprobs")
            return
        assert incoming.connection is not None
        assert incoming.of is not None
        del self._all[sequence]
        incoming.peer.breaker.succeeded()
        saved = self._exchange.layout.bytes_of(sequence.cached_tokens)
        report = HandoffReport(id=incoming.id, received_bytes=incoming.received, saved_bytes=saved, attempts=incoming.attempts)
        self._counters["handoffs_received"] += 1
        self._counters["received_bytes"] += incoming.received
        self._counters["saved_bytes"] += saved
        incoming.connection.link.send(Release(of=incoming.of))
        self._end_attempt(incoming, cancel=False, keep=True)
        logprob = None
        if first.logprob is not None:
            wanted = sequence.request.params.logprobs or 0
            logprob = TokenLogprob(first.token, first.logprob, first.rank, [(t, p) for t, p in first.top][:wanted])
        self._exchange.host.arrived(sequence, first.token, logprob, report)

    def _failed(self, incoming: Incoming, code: str, reason: str, *, retry: bool = True, report: bool = True) -> None:
        """An attempt, or the way to one, has failed: try again, or compute the prompt here."""
        self._counters["attempts_failed"] += 1
        self._counters[f"failed_{code}"] += 1
        log.info("handoff %s, attempt %d at %s: %s: %s", incoming.id, incoming.attempts, incoming.peer, code, reason)
        if report and incoming.allowed:
            incoming.peer.breaker.failed()
        incoming.allowed = False
        if incoming.of is None:
            incoming.attempts += 1
        else:
            self._end_attempt(incoming, cancel=True)
        if retry and incoming.attempts < self._exchange.settings.attempts:
            self._counters["retries"] += 1
            self._wait(incoming)
        else:
            self._compute(incoming, code)

    def _end_attempt(self, incoming: Incoming, *, cancel: bool, keep: bool = False) -> None:
        """The attempt is over on this side. keep: its pages are the sequence's, which goes on with them."""
        if incoming.timer is not None:
            incoming.timer.cancel()
            incoming.timer = None
        of, lease, connection = incoming.of, incoming.lease, incoming.connection
        incoming.of = incoming.lease = incoming.connection = None
        if of is None or lease is None or connection is None:
            return
        del self._receiving[of]
        self._exchange.transport.expect(len(self._receiving))
        if incoming.drained:
            self._exchange.host.kv.allocator.release(lease)
        else:
            self._quarantine.drain(of, connection, lease)
            if cancel:
                connection.link.send(Cancel(of=of))
        if not keep:
            self._exchange.host.give_up(incoming.sequence)
        self._quarantine.try_to_end()
        self._exchange.host.wake()

    def _compute(self, incoming: Incoming, why: str) -> None:
        """Prefill it here."""
        self._counters["local_prefills"] += 1
        self._counters[f"local_{why}"] += 1
        self._leave(incoming)
        self._exchange.host.compute(incoming.sequence)

    def _refuse(self, incoming: Incoming, error: FluentError) -> None:
        self._counters["refused"] += 1
        self._leave(incoming)
        self._exchange.host.refuse(incoming.sequence, error)

    def _leave(self, incoming: Incoming) -> None:
        self._all.pop(incoming.sequence, None)
        if incoming.allowed:
            incoming.peer.breaker.forgo()
        self._release_peer(incoming)
        self._end_attempt(incoming, cancel=True)

    def _release_peer(self, incoming: Incoming) -> None:
        """Let the prefill engine forget the prompt, now or when it can be reached."""
        self._forget(incoming.peer, incoming.id)

    def _forget(self, peer: PrefillPeer, handoff: str) -> None:
        peer.forgotten.append(handoff)
        if peer.connection is not None:
            self._ready(peer)
        elif peer.breaker.state == "closed":
            peer.connect()

    def _time(self, incoming: Incoming, seconds: float, call: object) -> None:
        if incoming.timer is not None:
            incoming.timer.cancel()
        incoming.timer = self._exchange.after(seconds, call)  # type: ignore[arg-type]

    def _checksum(self, incoming: Incoming, layers: range, pages: slice) -> int:
        size = self._exchange.layout.page_size
        last = pages.stop == len(incoming.pages)
        held = incoming.sequence.published
        tokens = incoming.sequence.prompt_length - (held + len(incoming.pages) - 1) * size if last else size
        return self._exchange.checksum(incoming.pages[pages], layers, tokens)
