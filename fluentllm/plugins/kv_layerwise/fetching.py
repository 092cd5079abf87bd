"""The prefill side of `Fetch`: a prefix that decode has and prefill lacks is brought from there, where that takes less time
than computing it.

    held (for decode's ask, some milliseconds) → fetching → its pages enter the radix tree ↘
                  ↓ nothing to fetch, or not worth it       ↓ failed, or late             computed, as far as it lacks any
                  └─────────────────────────────────────────┴─────────────────────────────↗

A request is held only where both engines were given it at once and its prompt takes long to compute. Between engines of
several ranks nothing is fetched: their ranks would have to agree.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...transfer.messages import Attempt, Cancel, Drained, Failed, Fetch, Group, Reserve
from .pacing import WORTH

if TYPE_CHECKING:
    import asyncio

    from ...core.kv.cache import Prefix
    from ...core.sequence import Sequence
    from .exchange import Connection, Exchange
    from .outgoing import Outgoing
    from .quarantine import Quarantine

log = logging.getLogger("fluentllm.handoff")


@dataclass(slots=True, eq=False)
class Fetching:
    of: Attempt
    connection: Connection
    sequence: Sequence
    prefix: Prefix
    timer: asyncio.TimerHandle
    drained: bool = False


class Fetcher:
    """Requests that are kept from being computed. Each goes on by `Host.compute`, once."""

    def __init__(self, exchange: Exchange, quarantine: Quarantine) -> None:
        self._exchange, self._quarantine = exchange, quarantine
        self._held: dict[Sequence, asyncio.TimerHandle] = {}
        self._fetching: dict[Sequence, Fetching] = {}
        self._by_attempt: dict[Attempt, Fetching] = {}

    @property
    def open(self) -> int:
        return len(self._held) + len(self._fetching) + self._quarantine.open

    @property
    def receiving(self) -> bool:
        """Somebody writes here."""
        return bool(self._fetching)

    # ------------------------------------------------------------------------------------------------- from the sender
    def hold(self, outgoing: Outgoing, *, concurrent: bool) -> bool:
        """A request that decode has not asked for yet. True if it waits for the ask."""
        settings, pacing = self._exchange.settings, self._exchange.pacing
        if not concurrent or not self._possible(outgoing):
            return False
        seconds = settings.fetch_wait
        if settings.fetch == "auto":
            seconds = min(seconds, WORTH * pacing.passes.slope * outgoing.tokens)
        if seconds <= 0:
            return False
        self._held[outgoing.sequence] = self._exchange.after(seconds, self._not_asked, outgoing.sequence)
        return True

    def consider(self, outgoing: Outgoing, connection: Connection, ask: Reserve) -> bool:
        """A request that decode has asked for, and that is not with the scheduler. True if its prefix is being fetched."""
        exchange, layout = self._exchange, self._exchange.layout
        kv, size = exchange.host.kv, layout.page_size
        # The last token is always computed: its logits are needed.
        pages = min(ask.held_pages, (outgoing.tokens - 1) // size)
        if not self._possible(outgoing) or connection.layout.tp_size > 1 or not pages or self._quarantine.full:
            return False
        prompt = outgoing.sequence.tokens[: pages * size]
        lacking = (pages - kv.cached_pages(prompt)) * size
        pays = exchange.settings.fetch == "always" or exchange.pacing.fetching_pays(lacking, layout.bytes_of(lacking))
        if lacking <= 0 or not pays or exchange.host.waiting:
            return False
        prefix = kv.expect_prefix(prompt, outgoing.id)
        if prefix is None:
            return False
        timer = exchange.after(exchange.settings.fetch_timeout, self._late, outgoing.sequence)
        fetching = Fetching(ask.of, connection, outgoing.sequence, prefix, timer)
        self._fetching[outgoing.sequence] = self._by_attempt[ask.of] = fetching
        checksums = exchange.settings.checksums
        connection.link.send(Fetch(of=ask.of, first_page=len(prefix.held), pages=prefix.new, checksums=checksums))
        exchange.transport.expect(self.open)
        return True

    def asked(self, outgoing: Outgoing, connection: Connection, ask: Reserve) -> None:
        """Decode asks for a request that came before."""
        timer = self._held.pop(outgoing.sequence, None)
        if timer is not None:
            timer.cancel()
            if not self.consider(outgoing, connection, ask):
                self._exchange.host.compute(outgoing.sequence)

    def forget(self, sequence: Sequence) -> bool:
        """Its client left. True if it was kept here."""
        timer = self._held.pop(sequence, None)
        if timer is not None:
            timer.cancel()
            return True
        fetching = self._fetching.get(sequence)
        if fetching is not None:
            self._end(fetching, arrived=False)
        return fetching is not None

    # --------------------------------------------------------------------------------------------------- from the peer
    def group(self, connection: Connection, group: Group) -> None:
        exchange, layout = self._exchange, self._exchange.layout
        fetching = self._by_attempt.get(group.of)
        if fetching is None or fetching.connection is not connection:
            exchange.counters["groups_stale"] += 1
            return
        pages = fetching.prefix.new
        if (group.page_count, group.layer_count, group.groups) != (len(pages), layout.layers, 1):
            self._failed(fetching, "protocol")
        elif group.checksum is not None and group.checksum != exchange.checksum(
            connection, pages, range(layout.layers), layout.page_size, sent=False
        ):
            exchange.counters["groups_corrupt"] += 1
            self._failed(fetching, "corrupt")
        else:
            exchange.counters["fetched_bytes"] += group.bytes
            exchange.counters["fetched_tokens"] += len(pages) * layout.page_size
            self._end(fetching, arrived=True)
            exchange.host.compute(fetching.sequence)

    def message(self, message: Drained | Failed) -> None:
        if isinstance(message, Drained) and self._quarantine.drained(message.of):
            return
        fetching = self._by_attempt.get(message.of)
        if fetching is None:
            self._exchange.counters["messages_stale"] += 1
        elif isinstance(message, Drained):
            # The notification comes another way, and may be later; the timer says when it does not.
            fetching.drained = True
        else:
            self._failed(fetching, message.code)

    def gone(self, connection: Connection) -> None:
        self._quarantine.gone(connection)
        for fetching in [item for item in self._fetching.values() if item.connection is connection]:
            self._failed(fetching, "connection")

    # ---------------------------------------------------------------------------------------------------------- inside
    def _possible(self, outgoing: Outgoing) -> bool:
        settings = self._exchange.settings
        if settings.fetch == "never" or self._exchange.layout.tp_size > 1 or not self._exchange.host.kv.prefix_cache:
            return False
        return outgoing.sequence.request.params.prompt_logprobs is None  # they come from computing the whole prompt

    def _not_asked(self, sequence: Sequence) -> None:
        if self._held.pop(sequence, None) is not None:
            self._exchange.counters["deadline_ask"] += 1
            self._exchange.host.compute(sequence)

    def _late(self, sequence: Sequence) -> None:
        fetching = self._fetching.get(sequence)
        if fetching is not None:
            self._exchange.counters["deadline_fetch"] += 1
            self._failed(fetching, "timeout")

    def _failed(self, fetching: Fetching, code: str) -> None:
        """Then it is computed."""
        self._exchange.counters["fetches_failed"] += 1
        self._exchange.counters[f"fetch_{code}"] += 1
        log.info("handoff %s: a prefix was not fetched: %s", fetching.of.handoff, code)
        self._end(fetching, arrived=False)
        self._exchange.host.compute(fetching.sequence)

    def _end(self, fetching: Fetching, *, arrived: bool) -> None:
        exchange, prefix = self._exchange, fetching.prefix
        kv = exchange.host.kv
        fetching.timer.cancel()
        del self._fetching[fetching.sequence], self._by_attempt[fetching.of]
        if arrived:
            kv.keep_prefix(prefix)
        else:
            kv.drop_prefix(prefix)
        if fetching.drained:
            kv.allocator.release(prefix.writer)
        else:
            self._quarantine.drain(fetching.of, fetching.connection, prefix.writer)
            if not arrived:
                fetching.connection.link.send(Cancel(of=fetching.of))
        self._quarantine.try_to_end()
        exchange.host.wake()
