"""What decode says to a prefill engine: the request, where no router has brought it, and where its KV is to be written."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ...core.kv.events import encode_tokens
from ...transfer.messages import MAX_PROMPT, Attempt, Compute, Reserve
from .incoming import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...core.kv.pages import Lease
    from .exchange import Connection, Exchange
    from .incoming import Incoming


def reserve(exchange: Exchange, incoming: Incoming, connections: list[Connection], lease: Lease) -> Iterator[Writer]:
    """Ask each rank for its part of `incoming.pages`, which `lease` holds."""
    sequence, allocator = incoming.sequence, exchange.host.kv.allocator
    prompt = encode_tokens(sequence.tokens[: sequence.prompt_length])
    left = max(0.0, incoming.deadline - exchange.loop.time())
    for number, connection in enumerate(connections):
        of = Attempt(incoming.id, incoming.asks, connection.epoch, exchange.epoch)
        if number:  # each writer has a lease of its own, that ends when this writer is drained
            lease = allocator.lease("remote", incoming.id)
            allocator.share(lease, incoming.pages)
        covered = np.zeros((exchange.layout.layers, len(incoming.pages)), dtype=bool)
        yield Writer(of, connection, lease, covered)
        connection.link.send(
            Reserve(
                of=of,
                prompt_tokens=sequence.prompt_length,
                prompt_hash=hashlib.sha256(prompt).digest(),
                held_pages=sequence.published,
                pages=incoming.pages,
                deadline=min(exchange.settings.transfer_timeout, left),
                checksums=exchange.settings.checksums,
            )
        )


def tell_request(exchange: Exchange, incoming: Incoming) -> bool:
    """To an engine that no router has given it to, as far as we know. Returns whether it was told."""
    first = incoming.peer.connections[0]
    known = first.epoch in incoming.known or (not incoming.asks and not incoming.tried and not incoming.attempts)
    incoming.known.add(first.epoch)
    if known or not can_tell(incoming):
        return False
    request = incoming.sequence.request
    first.link.send(
        Compute(
            of=Attempt(incoming.id, incoming.asks, first.epoch, exchange.epoch),
            prompt=encode_tokens(request.prompt),
            params=request.params,
            priority=request.priority,
        )
    )
    return True


def can_tell(incoming: Incoming) -> bool:
    """Whether another engine can be told the request: it fits into one message, its grammar too."""
    request = incoming.sequence.request
    grammar = request.params.grammar
    return 4 * len(request.prompt) + (0 if grammar is None else 4 * len(grammar.source)) <= MAX_PROMPT
