"""The decode side: a prompt's KV is asked for, written into pages reserved for it, and checked; then the request decodes.

    waiting → receiving → (arrived) ↘
       ↑ again, other pages ↓         draining → over
       └──────────────── failed ─────↗   ↘ quarantined (until the memory is registered anew)

What fails is tried again at the same peer, then at other prefill engines, which are told the request; then it becomes an
ordinary one, whose prompt is computed here. Pages that a writer may still write to stay leased (`draining`) until it says that
it is drained.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from ...core.errors import FluentError, InvalidRequest
from ...core.types import HandoffReport, TokenLogprob
from ...transfer.messages import (
    Attempt,
    Cancel,
    Drained,
    Failed,
    Fetch,
    FirstToken,
    Message,
    Refuse,
    Release,
)
from .asking import can_tell, reserve, tell_request
from .incoming import Incoming
from .lending import Lender
from .peers import PrefillPeer, address

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...core.kv.pages import Lease
    from ...core.sequence import Sequence
    from ...transfer.messages import Group
    from .exchange import Connection, Exchange
    from .quarantine import Quarantine

log = logging.getLogger("fluentllm.handoff")

GRACE = 0.25
"""Seconds for which notifications may be later than the word that everything was sent."""
LOST = ("connection", "unreachable", "breaker")
"""Failures of the peer itself: trying it again at once is of little use."""
FORGOTTEN = ("unknown", "client_left")
"""The peer does not have the request, or has no longer."""


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
        self.lender = Lender(exchange)
        quarantine.receiving = lambda: bool(self._receiving or self.lender.open)

    @property
    def open(self) -> int:
        return len(self._all) + self._quarantine.open + self.lender.open

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
        deadline = self._exchange.loop.time() + self._exchange.settings.handoff_timeout
        self._all[sequence] = incoming = Incoming(handoff, sequence, self.peer_of(host, port), deadline)
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
        self._release_peers(incoming)
        return True

    def turn(self) -> None:
        """Begin what waits, in order, as far as pages go."""
        for incoming in [item for item in self._all.values() if item.waits]:
            if not self._begin(incoming):
                break

    # ----------------------------------------------------------------------------------------------------- from peers
    def group(self, connection: Connection, group: Group) -> None:
        incoming = self._receiving.get(group.of)
        writer = None if incoming is None else incoming.writers[group.of]
        if incoming is None or writer is None or writer.connection is not connection:
            self._counters["groups_stale"] += 1
            return
        layers, pages = group.first_layer + group.layer_count, group.first_page + group.page_count
        if layers > writer.covered.shape[0] or pages > writer.covered.shape[1]:
            self._failed(incoming, "protocol", "A group lies outside of what was asked for.")
            return
        if group.group in writer.groups:
            self._counters["groups_repeated"] += 1
            return
        if group.checksum is not None and group.checksum != self._checksum(incoming, connection, group):
            self._counters["groups_corrupt"] += 1
            self._failed(incoming, "corrupt", "A group's checksum is wrong.")
            return
        writer.add(group)
        self._counters["groups_received"] += 1
        self._check(incoming)

    def gone(self, connection: Connection, error: FluentError) -> None:
        for peer in self._peers.values():
            if connection in peer.connections.values():
                peer.lost(error)
        self._quarantine.gone(connection)
        for incoming in list(self._all.values()):
            if any(writer.connection is connection for writer in incoming.writers.values()):
                self._failed(incoming, "connection", str(error), report=False)

    def _message(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Fetch):
            self._fetch(connection, message)
            return
        if isinstance(message, Cancel):
            self.lender.cancel(connection, message.of)
            return
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
            writer = incoming.writers[of]
            writer.first, writer.count = message, message.groups
            self._check(incoming)
        else:
            # What was refused was never begun.
            incoming.writers[of].drained |= isinstance(message, Refuse)
            if message.code in FORGOTTEN:
                incoming.known.discard(of.source)
            self._failed(incoming, message.code, message.reason, retry=message.code != "prompt")

    def _drained(self, of: Attempt, message: Drained) -> None:
        if self._quarantine.drained(of):
            return
        incoming = self._receiving.get(of)
        if incoming is not None:
            incoming.writers[of].drained = True
            # Notifications come another way, and may be later than this.
            self._time(incoming, GRACE, partial(self._failed, incoming, "lost", "Groups were sent that did not arrive."))

    def _fetch(self, connection: Connection, ask: Fetch) -> None:
        incoming = self._receiving.get(ask.of)
        sequence = None if incoming is None else incoming.sequence
        self.lender.lend(connection, ask, [] if sequence is None else sequence.pages[: sequence.published])

    def _ready(self, peer: PrefillPeer) -> None:
        while peer.ready and peer.forgotten:
            handoff = peer.forgotten.popleft()
            for connection in peer.writers:
                connection.link.send(Release(of=Attempt(handoff, 0, connection.epoch, self._exchange.epoch)))
        self._exchange.host.wake()

    def _unreachable(self, peer: PrefillPeer, error: FluentError) -> None:
        self._counters["connections_failed"] += 1
        for incoming in [item for item in self._all.values() if item.peer is peer and item.waits]:
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
        if incoming.peer.ready:  # pages are short here, whoever sends
            self._compute(incoming, "wait")
        else:
            self._failed(incoming, "wait", "It could not be reached in time.", retry=False)

    def _expired(self, incoming: Incoming) -> None:
        self._counters["deadline_handoff"] += 1
        self._compute(incoming, "deadline")

    def _begin(self, incoming: Incoming) -> bool:
        """Ask for it. False if pages are short."""
        peer, host, sequence = incoming.peer, self._exchange.host, incoming.sequence
        if not incoming.allowed:
            if not peer.breaker.allows():
                self._failed(incoming, "breaker", "It has failed too often.", retry=False, report=False)
                return True
            incoming.allowed = True
        if self._quarantine.full:
            return False
        if not peer.ready:
            peer.connect()
            return True
        # Who waits for pages in the scheduler goes first: its pages would be taken away from under it else.
        if host.waiting:
            return False
        lease = host.expect(sequence, incoming.id)
        if lease is None:
            return False
        self._ask(incoming, peer.writers, lease)
        return True

    def _ask(self, incoming: Incoming, connections: list[Connection], lease: Lease) -> None:
        sequence = incoming.sequence
        incoming.pages = sequence.pages[sequence.published : self._exchange.host.kv.pages_for(sequence.prompt_length)]
        if tell_request(self._exchange, incoming):
            self._counters["requests_told"] += 1
        for writer in reserve(self._exchange, incoming, connections, lease):
            incoming.writers[writer.of] = writer
            self._receiving[writer.of] = incoming
        incoming.attempts += 1
        incoming.asks += 1
        self._expect()
        self._time(incoming, self._exchange.settings.transfer_timeout, partial(self._late, incoming))

    def _late(self, incoming: Incoming) -> None:
        self._counters["deadline_transfer"] += 1
        incoming.known -= {of.source for of in incoming.writers}  # a router's half may be lost: told, it is there for sure
        self._failed(incoming, "timeout", "It was not complete in time.")

    def _check(self, incoming: Incoming) -> None:
        """Whether everything is there."""
        writers = list(incoming.writers.values())
        if not all(writer.complete for writer in writers):
            return
        if not all(writer.covered.all() for writer in writers):
            self._failed(incoming, "protocol", "Every group has come, but not every layer of every page.")
            return
        sequence, first = incoming.sequence, writers[0].first
        assert first is not None
        if sequence.request.params.logprobs is not None and first.logprob is None:
            self._end_attempt(incoming, cancel=False)
            self._compute(incoming, "logprobs")
            return
        del self._all[sequence]
        incoming.peer.breaker.succeeded()
        saved = self._exchange.layout.bytes_of(sequence.cached_tokens)
        received = sum(writer.received for writer in writers)
        report = HandoffReport(id=incoming.id, received_bytes=received, saved_bytes=saved, attempts=incoming.asks)
        self._counters["handoffs_received"] += 1
        self._counters["received_bytes"] += received
        self._counters["saved_bytes"] += saved
        for writer in writers:
            writer.connection.link.send(Release(of=writer.of))
        for peer in incoming.tried:
            self._forget(peer, incoming.id, connect=False)
        self._end_attempt(incoming, cancel=False, keep=True)
        logprob = None
        if first.logprob is not None:
            wanted = sequence.request.params.logprobs or 0
            logprob = TokenLogprob(first.token, first.logprob, first.rank, [(t, p) for t, p in first.top][:wanted])
        self._exchange.host.arrived(sequence, first.token, logprob, report)

    def _failed(self, incoming: Incoming, code: str, reason: str, *, retry: bool = True, report: bool = True) -> None:
        """An attempt, or the way to one, has failed: try again, elsewhere, or compute the prompt here."""
        self._counters["attempts_failed"] += 1
        self._counters[f"failed_{code}"] += 1
        log.info("handoff %s, attempt %d at %s: %s: %s", incoming.id, incoming.attempts, incoming.peer, code, reason)
        if report and incoming.allowed:
            incoming.peer.breaker.failed()
        incoming.allowed = False
        if incoming.waits:
            incoming.attempts += 1
        else:
            self._end_attempt(incoming, cancel=True)
        again = retry and incoming.attempts < self._exchange.settings.attempts
        if not (again and code not in LOST) and code != "prompt" and self._turn_to_another(incoming):
            self._counters["rerouted"] += 1
            again = True
        if again:
            self._counters["retries"] += 1
            self._wait(incoming)
        else:
            self._compute(incoming, code)

    def _turn_to_another(self, incoming: Incoming) -> bool:
        """Another prefill engine, if one can be told the request."""
        if not can_tell(incoming):
            return False
        for peer in self._peers.values():
            if peer is not incoming.peer and peer not in incoming.tried and not peer.refusal and peer.breaker.state != "open":
                incoming.tried.append(incoming.peer)
                incoming.peer, incoming.attempts = peer, 0
                return True
        return False

    def _end_attempt(self, incoming: Incoming, *, cancel: bool, keep: bool = False) -> None:
        """The attempt is over on this side. keep: its pages are the sequence's, which goes on with them."""
        if incoming.timer is not None:
            incoming.timer.cancel()
            incoming.timer = None
        writers, incoming.writers = list(incoming.writers.values()), {}
        if not writers:
            return
        for writer in writers:
            del self._receiving[writer.of]
        for writer in writers:
            if writer.drained:
                self._exchange.host.kv.allocator.release(writer.lease)
                continue
            self._quarantine.drain(writer.of, writer.connection, writer.lease)
            if cancel:
                writer.connection.link.send(Cancel(of=writer.of))
        self._expect()
        if not keep:
            self._exchange.host.give_up(incoming.sequence)
        self._quarantine.try_to_end()
        self._exchange.host.wake()

    def _expect(self) -> None:
        self._exchange.transport.expect(len(self._receiving))

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
        self._release_peers(incoming)
        self._end_attempt(incoming, cancel=True)

    def _release_peers(self, incoming: Incoming) -> None:
        """Let prefill engines forget the prompt, now or when they can be reached."""
        self._forget(incoming.peer, incoming.id)
        for peer in incoming.tried:
            self._forget(peer, incoming.id, connect=False)

    def _forget(self, peer: PrefillPeer, handoff: str, *, connect: bool = True) -> None:
        peer.forgotten.append(handoff)
        if peer.ready:
            self._ready(peer)
        elif connect and peer.breaker.state == "closed":
            peer.connect()

    def _time(self, incoming: Incoming, seconds: float, call: Callable[[], None]) -> None:
        """Every state draws from what is left of the handoff's own time."""
        if incoming.timer is not None:
            incoming.timer.cancel()
        left = incoming.deadline - self._exchange.loop.time()
        if left <= seconds:
            seconds, call = max(left, 0.0), partial(self._expired, incoming)
        incoming.timer = self._exchange.after(seconds, call)

    def _checksum(self, incoming: Incoming, connection: Connection, group: Group) -> int:
        size = self._exchange.layout.page_size
        end = group.first_page + group.page_count
        held = incoming.sequence.published
        last = end == len(incoming.pages)
        tokens = incoming.sequence.prompt_length - (held + end - 1) * size if last else size
        layers = range(group.first_layer, group.first_layer + group.layer_count)
        return self._exchange.checksum(connection, incoming.pages[group.first_page : end], layers, tokens, sent=False)
