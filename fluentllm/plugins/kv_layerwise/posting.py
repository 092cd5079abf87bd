"""Which layers of which pages are due, and how they are handed to the transport."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...transfer.descriptors import plan_rank_writes
from ...transfer.messages import FirstToken, Group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...transfer.layout import KVLayout
    from .exchange import Exchange
    from .outgoing import Outgoing, Sending


def due(outgoing: Outgoing, sending: Sending, layout: KVLayout, group: int) -> Iterator[tuple[range, range, bool]]:
    """Pages, layers and whether it is the last, of what is complete and not sent: whole groups of layers of each chunk, and
    chunks that are complete together. Marked as sent."""
    chunks = outgoing.chunks
    sending.sent += [0] * (len(chunks) - len(sending.sent))
    total = layout.layers
    # What proposers keep for pages goes with the last layer, and is not there before the pass has ended.
    target = total - max(layout.draft_layers, bool(layout.page_states))
    number = 0
    while number < len(chunks):
        chunk, sent = chunks[number], sending.sent[number]
        ready = total if chunk.progress.ended else min(chunk.progress.layers, target)
        last = number
        if ready == total and sent == 0:
            while last + 1 < len(chunks) and chunks[last + 1].progress.ended and not sending.sent[last + 1]:
                last += 1
        if ready > sent and (ready == total or ready - sent >= group):
            pages = range(chunk.first, chunks[last].end)
            sending.sent[number : last + 1] = [ready] * (last + 1 - number)
            final = pages.stop == len(outgoing.pages) and all(count == total for count in sending.sent)
            yield pages, range(sent, ready), final
        number = last + 1


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


def tell_first(outgoing: Outgoing, sending: Sending) -> None:
    """The first token, once, when it has been drawn."""
    if outgoing.first is None or sending.told:
        return
    sending.told = True
    token, logprob, rank, top = outgoing.first
    sending.connection.link.send(
        FirstToken(
            of=sending.of,
            token=token,
            logprob=logprob,
            rank=rank,
            top=top,
            cached_tokens=outgoing.sequence.cached_tokens,
            groups=sending.groups,
        )
    )
