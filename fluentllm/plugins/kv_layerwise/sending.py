"""The prefill side: a prompt is computed here, and its KV written to a decode engine's pages as layers become complete.

A handoff begins with the request and is *asked for* by decode (`Reserve`), before, while or after the prompt is computed; each
ask is an attempt. What is complete and has not been sent goes, whenever a group of layers is complete or an ask comes. The
handoff ends when decode releases it, when its client leaves before it is computed, or when nobody asks for it in time. A
request that no router has brought may come from decode (`Compute`).
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from ...core.errors import FluentError
from ...core.kv.events import decode_tokens, encode_tokens
from ...core.transport import TransportError
from ...core.types import Handoff, Request
from ...transfer.descriptors import PageError
from ...transfer.messages import Cancel, Compute, Drained, Failed, Message, Refuse, Release, Reserve
from ...transfer.slices import targets_of
from .fetching import Fetcher
from .outgoing import Chunk, Early, Outgoing, Sending
from .posting import due, post_group, tell_first
from .watch import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from ...core.sequence import Sequence
    from ...core.transport import TransferDone
    from ...core.types import SlotResult, StepPlan
    from ...transfer.messages import Attempt
    from .exchange import Connection, Exchange
    from .quarantine import Quarantine
    from .watch import Watch


MAX_REMEMBERED = 4096
"""Handoffs that are over; the oldest are forgotten."""


class Sender:
    """All handoffs that leave this engine. `watch` follows the passes."""

    def __init__(self, exchange: Exchange, watch: Watch, quarantine: Quarantine) -> None:
        self._exchange, self._watch = exchange, watch
        self.fetcher = Fetcher(exchange, quarantine)
        self._quarantine = quarantine
        # Registering anew cuts off what is being sent too: only where that is all that is left to do.
        quarantine.receiving = lambda: self.fetcher.receiving or (bool(self._sendings) and not quarantine.full)
        self._counters = exchange.counters
        self._by_id: dict[str, Outgoing] = {}
        self._by_sequence: dict[Sequence, Outgoing] = {}
        self._early: dict[str, dict[int, Early]] = {}
        """Asked for before the request came: handoff → rank of decode."""
        self._unwanted_early: dict[str, bool] = {}
        """Released before the request came: nobody will ask for these."""
        self._over: dict[str, bool] = {}
        """Released after it came, so that saying it twice means nothing."""
        self._requests_told: dict[str, bool] = {}
        """Ids of those from decode that are on their way in: their grammars may take long to compile."""
        self._sendings: dict[Attempt, tuple[Sending, Outgoing]] = {}
        self._doubtful: dict[Attempt, bool] = {}
        self._transfers: dict[int, Sending] = {}
        self._last_done = 0.0

    @property
    def open(self) -> int:
        return len(self._by_id) + len(self._sendings) + len(self._early) + self.fetcher.open

    # ------------------------------------------------------------------------------------------------- from the engine
    def adopt(self, sequence: Sequence, handoff: Handoff) -> bool:
        """True if it is kept from being computed for now."""
        name, known = handoff.id, self._by_id.get(handoff.id)
        if self._unwanted_early.pop(name, False) or (known is not None and known.told is not None):
            # Nobody wants it, or what decode told us is here already: computed like any other, and not sent.
            return False
        tokens = sequence.tokens
        outgoing = Outgoing(name, sequence, len(tokens), hashlib.sha256(encode_tokens(tokens)).digest())
        if self._requests_told.pop(sequence.request.id, False):
            outgoing.told = sequence.request.id
        if known is not None:
            self._finish(known)
        self._by_id[name] = self._by_sequence[sequence] = outgoing
        asked = self._early.pop(name, {})
        for early in asked.values():
            early.timer.cancel()
            self._begin(outgoing, early.connection, early.ask)
        if not asked:
            return self.fetcher.hold(outgoing, concurrent=handoff.concurrent)
        early = next(iter(asked.values()))
        return self.fetcher.consider(outgoing, early.connection, early.ask)

    def planned(self, plan: StepPlan, sequences: SequenceOf[Sequence]) -> None:
        size = self._exchange.layout.page_size
        found = []
        for chunk, sequence in zip(plan.prefill, sequences, strict=True):
            outgoing = self._by_sequence.get(sequence)
            total = 0 if outgoing is None else -(-outgoing.tokens // size)
            if outgoing is None or (outgoing.chunks and outgoing.chunks[-1].end == total):
                continue  # not ours, or it comes back after a preemption: what is needed is known already
            if outgoing.lease is None:
                allocator = self._exchange.host.kv.allocator
                outgoing.pages = sequence.pages[:total]
                outgoing.lease = allocator.lease("sending", outgoing.id)
                allocator.share(outgoing.lease, outgoing.pages)
            first = outgoing.chunks[-1].end if outgoing.chunks else 0
            end = total if chunk.last else (chunk.start + chunk.count) // size
            progress = Progress()
            outgoing.chunks.append(Chunk(first, end, progress))
            found.append(progress)
        if found:
            tokens = sum(chunk.count for chunk in plan.prefill)
            self._watch.group = self._exchange.pacing.group(tokens, self._exchange.layout.bytes_of(tokens))
            self._watch.expect(plan.step, found)

    def drew(self, sequence: Sequence, result: SlotResult) -> None:
        outgoing = self._by_sequence.pop(sequence, None)
        if outgoing is None:
            return
        outgoing.computing = False
        logprob = result.logprobs[0] if result.logprobs else None
        known = (logprob.logprob, logprob.rank, logprob.top) if logprob is not None else (None, 0, [])
        outgoing.first = (result.tokens[0], *known)
        if not outgoing.closed:
            outgoing.timer = self._exchange.after(self._exchange.settings.keep_timeout, self._unwanted, outgoing)
            self._advance(outgoing)

    def abort(self, sequence: Sequence) -> bool:
        """Its client left before it was computed. True if it was kept from being computed."""
        held = self.fetcher.forget(sequence)
        outgoing = self._by_sequence.pop(sequence, None)
        if outgoing is not None:
            self._fail(outgoing, "client_left", "The client of the prefill engine left.")
            self._finish(outgoing)
        return held

    def advanced(self) -> None:
        """Some pass has come further."""
        for outgoing in list(self._by_id.values()):
            self._advance(outgoing)

    # --------------------------------------------------------------------------------------------------- from the peer
    def message(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Reserve):
            self._asked(connection, message)
        elif isinstance(message, Cancel):
            self._cancel(connection, message.of)
        elif isinstance(message, Release):
            self._release(connection, message.of.handoff)
        elif isinstance(message, Compute):
            self._told(connection, message)
        elif isinstance(message, Drained | Failed):
            self.fetcher.message(message)
        else:
            self._counters["messages_unexpected"] += 1

    def gone(self, connection: Connection) -> None:
        """Its transfers end by themselves; the prompt is kept for a while, since the peer may come back and ask again."""
        for sending, outgoing in list(self._sendings.values()):
            if sending.connection is connection:
                self._stop(sending)
                _forget(outgoing, sending)
        self.fetcher.gone(connection)
        for handoff, asked in list(self._early.items()):
            if any(early.connection is connection for early in asked.values()):
                self._drop_early(handoff, connection.layout.tp_rank)

    def transferred(self, done: TransferDone) -> None:
        sending = self._transfers.pop(done.transfer, None)
        if sending is None:
            return
        now = time.perf_counter()
        submitted = sending.transfers.pop(done.transfer)
        if done.status == "done":
            self._counters["sent_bytes"] += done.size
            self._exchange.pacing.sent(done.size, now - max(submitted, self._last_done))
            self._last_done = now
        elif done.status == "failed":
            self._counters["transfers_failed"] += 1
            sending.doubtful = True
            if not sending.over:
                sending.connection.link.send(Failed(of=sending.of, code="transfer", reason=str(done.error or "unknown")[:1000]))
                self._stop(sending)
        self._settle(sending)

    # ---------------------------------------------------------------------------------------------------------- inside
    def _told(self, connection: Connection, message: Compute) -> None:
        """The request itself, from decode."""
        of = message.of
        if of.source != self._exchange.epoch or of.handoff in self._by_id:
            return
        request = Request(
            id=f"told-{of.handoff}-{of.target:x}-{of.attempt}",
            prompt=decode_tokens(message.prompt),
            params=message.params,
            priority=message.priority,
            handoff=Handoff(id=of.handoff),
        )
        self._unwanted_early.pop(of.handoff, None)
        self._requests_told[request.id] = True
        try:
            self._exchange.host.submit(request)
        except FluentError as error:
            self._requests_told.pop(request.id, None)
            self._counters["told_refused"] += 1
            connection.link.send(Refuse(of=of, code="busy", reason=str(error)[:4096]))
            return
        self._counters["requests_told"] += 1

    def _release(self, connection: Connection, handoff: str) -> None:
        self._drop_early(handoff, connection.layout.tp_rank)
        outgoing = self._by_id.get(handoff)
        if outgoing is not None:
            outgoing.released.add(connection.layout.tp_rank)
            if outgoing.released >= set(targets_of(self._exchange.layout, connection.layout)):
                self._finish(outgoing)
                self._over[handoff] = True
        elif handoff not in self._over:
            self._unwanted_early[handoff] = True
        for memory in (self._unwanted_early, self._over, self._requests_told):
            while len(memory) > MAX_REMEMBERED:
                del memory[next(iter(memory))]
        self._exchange.host.wake()

    def _asked(self, connection: Connection, ask: Reserve) -> None:
        exchange, of = self._exchange, ask.of
        if of.source != exchange.epoch or of.target != connection.epoch:
            connection.link.send(Refuse(of=of, code="epoch", reason="The ask is for another life of this engine."))
            self._counters["messages_stale"] += 1
            return
        outgoing = self._by_id.get(of.handoff)
        if outgoing is not None:
            self._begin(outgoing, connection, ask)
            self.fetcher.asked(outgoing, connection, ask)
            return
        rank = connection.layout.tp_rank
        self._drop_early(of.handoff, rank)
        timer = exchange.after(min(exchange.settings.wait_timeout, ask.deadline), self._request_never_came, of.handoff, rank)
        self._early.setdefault(of.handoff, {})[rank] = Early(connection, ask, timer)

    def _drop_early(self, handoff: str, rank: int) -> None:
        asked = self._early.get(handoff, {})
        early = asked.pop(rank, None)
        if early is not None:
            early.timer.cancel()
        if not asked:
            self._early.pop(handoff, None)

    def _begin(self, outgoing: Outgoing, connection: Connection, ask: Reserve) -> None:
        size = self._exchange.layout.page_size
        missing = -(-outgoing.tokens // size) - ask.held_pages
        if ask.prompt_tokens != outgoing.tokens or ask.prompt_hash != outgoing.digest or missing != len(ask.pages):
            connection.link.send(
                Refuse(of=ask.of, code="prompt", reason="The two halves of the request have different prompts.")
            )
            self._counters["prompts_differ"] += 1
            return
        if ask.of in self._sendings or ask.of in self._doubtful:
            self._counters["messages_repeated"] += 1
            return
        rank = connection.layout.tp_rank
        if rank in outgoing.sendings:
            self._stop(outgoing.sendings[rank])
        sending = Sending(ask.of, ask, connection)
        outgoing.sendings[rank] = sending
        self._sendings[ask.of] = (sending, outgoing)
        self._expect()
        self._advance(outgoing)

    def _expect(self) -> None:
        self._exchange.transport.expect(len(self._sendings) + self.fetcher.open)

    def _advance(self, outgoing: Outgoing) -> None:
        """Send what is complete."""
        if outgoing.closed or (outgoing.first is None and not self._exchange.settings.overlap):
            return
        for sending in list(outgoing.sendings.values()):
            if sending.over:
                continue
            try:
                self._send(outgoing, sending)
            except (TransportError, PageError) as error:
                sending.connection.link.send(Failed(of=sending.of, code=error.code, reason=str(error)[:1000]))
                self._stop(sending)
                self._settle(sending)
                continue
            tell_first(outgoing, sending)
            total = self._exchange.layout.layers
            sending.over |= sending.told and all(sent == total for sent in sending.sent)
            self._settle(sending)

    def _send(self, outgoing: Outgoing, sending: Sending) -> None:
        """Raises `TransportError`, `PageError`."""
        for pages, layers, last in due(outgoing, sending, self._exchange.layout, self._watch.group):
            transfer = post_group(self._exchange, outgoing, sending, pages, layers, last=last)
            if transfer is not None:
                sending.transfers[transfer] = time.perf_counter()
                self._transfers[transfer] = sending

    def _stop(self, sending: Sending) -> None:
        sending.over = True
        for number in sending.transfers:
            self._exchange.transport.cancel(number)

    def _settle(self, sending: Sending) -> None:
        """Say so when nothing of an attempt is under way, and nothing more will be."""
        if not sending.over or sending.transfers or sending.of not in self._sendings:
            return
        _, outgoing = self._sendings.pop(sending.of)
        self._expect()
        if sending.doubtful:
            self._doubtful[sending.of] = True
            if len(self._doubtful) > MAX_REMEMBERED:
                del self._doubtful[next(iter(self._doubtful))]
        else:
            sending.connection.link.send(Drained(of=sending.of, groups=sending.groups))
        self._free(outgoing)
        self._quarantine.try_to_end()

    def _cancel(self, connection: Connection, of: Attempt) -> None:
        found = self._sendings.get(of)
        if found is not None:
            self._counters["attempts_cancelled"] += 1
            sending, outgoing = found
            _forget(outgoing, sending)
            self._stop(sending)
            self._settle(sending)
            return
        rank = connection.layout.tp_rank
        early = self._early.get(of.handoff, {}).get(rank)
        if early is not None and early.ask.of == of:
            self._drop_early(of.handoff, rank)
        if of not in self._doubtful and of.source == self._exchange.epoch:
            connection.link.send(Drained(of=of))

    def _fail(self, outgoing: Outgoing, code: str, reason: str) -> None:
        for sending in outgoing.sendings.values():
            if not sending.over:
                sending.connection.link.send(Failed(of=sending.of, code=code, reason=reason))

    def _finish(self, outgoing: Outgoing) -> None:
        """Nobody wants it any more."""
        if outgoing.closed:
            return
        outgoing.closed = True
        if outgoing.timer is not None:
            outgoing.timer.cancel()
        if self._by_id.get(outgoing.id) is outgoing:
            del self._by_id[outgoing.id]
        self._by_sequence.pop(outgoing.sequence, None)
        for sending, other in list(self._sendings.values()):
            if other is outgoing:
                self._stop(sending)
                self._settle(sending)
        self._free(outgoing)
        if outgoing.told is not None and outgoing.computing:
            self._exchange.host.withdraw(outgoing.told)

    def _free(self, outgoing: Outgoing) -> None:
        """Its pages, once no transfer reads them and no ask may come."""
        busy = any(other is outgoing for _, other in self._sendings.values())
        if outgoing.closed and not busy and outgoing.lease is not None:
            self._exchange.host.kv.allocator.release(outgoing.lease)
            outgoing.lease = None
            self._exchange.host.wake()

    def _unwanted(self, outgoing: Outgoing) -> None:
        self._counters["deadline_keep"] += 1
        self._finish(outgoing)

    def _request_never_came(self, handoff: str, rank: int) -> None:
        early = self._early[handoff][rank]
        self._drop_early(handoff, rank)
        self._counters["deadline_request"] += 1
        refusal = Refuse(of=early.ask.of, code="unknown", reason="No request with this handoff came.")
        early.connection.link.send(refusal)
        self._exchange.host.wake()


def _forget(outgoing: Outgoing, sending: Sending) -> None:
    rank = sending.connection.layout.tp_rank
    if outgoing.sendings.get(rank) is sending:
        del outgoing.sendings[rank]
