"""Hands one group of layers to the transport."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...transfer.descriptors import plan_rank_writes
from ...transfer.messages import Group

if TYPE_CHECKING:
    from .exchange import Exchange
    from .outgoing import Outgoing, Sending


def post_group(
    exchange: Exchange, outgoing: Outgoing, sending: Sending, pages: range, layers: range, *, last: bool
) -> int | None:
    """Our rank's part of these layers of these pages, which are counted within the prompt; those that decode has are left
    out. Returns the transfer's number, None if nothing is left. Raises `TransportError`, `PageError`."""
    ask, size = sending.ask, exchange.layout.page_size
    pages = range(max(pages.start, ask.held_pages), pages.stop)
    if not pages:
        return None
    started = time.perf_counter()
    source = outgoing.pages[pages.start : pages.stop]
    target = ask.pages[pages.start - ask.held_pages : pages.stop - ask.held_pages]
    # Of the page that the prompt ends in, only the prompt's part: decode may write behind it by the time that a late repeat
    # of these bytes arrives.
    tokens = outgoing.tokens - (len(outgoing.pages) - 1) * size if pages.stop == len(outgoing.pages) else size
    writes = plan_rank_writes(exchange.layout, sending.connection.layout, layers, source, target, tokens)
    checksum = exchange.checksum(sending.connection, source, layers, tokens, sent=True) if ask.checksums else None
    group = Group(
        of=sending.of,
        group=sending.groups,
        first_page=pages.start - ask.held_pages,
        page_count=len(pages),
        first_layer=layers.start,
        layer_count=len(layers),
        rank=exchange.layout.tp_rank,
        bytes=int(writes[:, 2].sum()),
        checksum=checksum,
        groups=sending.groups + 1 if last else 0,
    )
    number = exchange.submit(sending.connection, writes, group)
    sending.groups += 1
    exchange.counters["groups_sent"] += 1
    exchange.counters["writes_sent"] += len(writes)
    exchange.pacing.posted(time.perf_counter() - started)
    return number
