"""The decode side of `Fetch`: pages that this engine has are written to a prefill engine that lacks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.transport import TransportError
from ...transfer.descriptors import PageError, plan_rank_writes
from ...transfer.messages import Attempt, Drained, Failed, Fetch, Group

if TYPE_CHECKING:
    from ...core.kv.pages import Lease
    from ...core.transport import TransferDone
    from .exchange import Connection, Exchange


@dataclass(slots=True, eq=False)
class Loan:
    of: Attempt
    connection: Connection
    lease: Lease
    """Our pages stay as they are while they are read, whatever becomes of the request."""
    tokens: int


class Lender:
    """All loans under way."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._loans: dict[int, Loan] = {}
        """By the transfer's number."""

    @property
    def open(self) -> int:
        return len(self._loans)

    def lend(self, connection: Connection, ask: Fetch, held: list[int]) -> None:
        """held: pages of the prompt that are complete here, from its first on; empty for a request that is over."""
        exchange, allocator = self._exchange, self._exchange.host.kv.allocator
        pages = held[ask.first_page : ask.first_page + len(ask.pages)]
        if len(pages) != len(ask.pages):
            self._fail(connection, ask.of, "stale", "These pages are not held for it.")
            return
        lease = allocator.lease("sending", ask.of.handoff)
        allocator.share(lease, pages)
        layout = exchange.layout
        try:
            writes = plan_rank_writes(layout, connection.layout, range(layout.layers), pages, ask.pages, layout.page_size)
            checksum = None
            if ask.checksums:
                checksum = exchange.checksum(connection, pages, range(layout.layers), layout.page_size, sent=True)
            group = Group(
                of=ask.of,
                group=0,
                groups=1,
                first_page=0,
                page_count=len(pages),
                first_layer=0,
                layer_count=layout.layers,
                bytes=int(writes[:, 2].sum()),
                checksum=checksum,
            )
            number = exchange.submit(connection, writes, group)
        except (TransportError, PageError) as error:
            allocator.release(lease)
            self._fail(connection, ask.of, error.code, str(error)[:1000])
            return
        self._loans[number] = Loan(ask.of, connection, lease, len(pages) * layout.page_size)

    def cancel(self, connection: Connection, of: Attempt) -> None:
        found = [number for number, loan in self._loans.items() if loan.of == of]
        for number in found:
            self._exchange.transport.cancel(number)
        if not found:
            connection.link.send(Drained(of=of))

    def transferred(self, done: TransferDone) -> None:
        loan = self._loans.pop(done.transfer, None)
        if loan is None:
            return
        exchange = self._exchange
        exchange.host.kv.allocator.release(loan.lease)
        if done.status == "failed":
            # Nobody knows whether its bytes still come: it is never drained.
            exchange.counters["transfers_failed"] += 1
            loan.connection.link.send(Failed(of=loan.of, code="transfer", reason=str(done.error or "unknown")[:1000]))
        else:
            if done.status == "done":
                exchange.counters["lent_bytes"] += done.size
                exchange.counters["lent_tokens"] += loan.tokens
            loan.connection.link.send(Drained(of=loan.of))
        exchange.host.wake()

    def _fail(self, connection: Connection, of: Attempt, code: str, reason: str) -> None:
        """Nothing was begun."""
        connection.link.send(Failed(of=of, code=code, reason=reason))
        connection.link.send(Drained(of=of))
