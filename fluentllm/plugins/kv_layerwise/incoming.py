"""What the decode side knows of one handoff, and of each rank that writes to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import asyncio

    from ...core.kv.pages import Lease
    from ...core.sequence import Sequence
    from ...transfer.messages import Attempt, FirstToken, Group
    from .exchange import Connection
    from .peers import PrefillPeer


@dataclass(slots=True, eq=False)
class Writer:
    """One rank of the prefill engine in one attempt."""

    of: Attempt
    connection: Connection
    lease: Lease
    covered: np.ndarray
    """bool [layers, pages]: what has arrived of its part."""
    groups: set[int] = field(default_factory=set)
    """Numbers of those that have arrived."""
    count: int | None = None
    """How many there are, once that is known."""
    first: FirstToken | None = None
    drained: bool = False
    received: int = 0

    @property
    def complete(self) -> bool:
        return self.first is not None and self.count is not None and len(self.groups) >= self.count

    def add(self, group: Group) -> None:
        layers = slice(group.first_layer, group.first_layer + group.layer_count)
        self.covered[layers, group.first_page : group.first_page + group.page_count] = True
        self.groups.add(group.group)
        self.received += group.bytes
        self.counted(group.groups)

    def counted(self, count: int) -> None:
        if count:
            self.count = count


@dataclass(slots=True, eq=False)
class Incoming:
    """One handoff."""

    id: str
    sequence: Sequence
    peer: PrefillPeer
    """Whom it is asked of now."""
    deadline: float
    """By the loop's clock: what is not here by then is computed here, whatever has been tried."""
    attempts: int = 0
    """At this peer."""
    asks: int = 0
    """In all."""
    known: set[int] = field(default_factory=set)
    """Lives (epochs) of engines that have the request, from a router or from us."""
    tried: list[PrefillPeer] = field(default_factory=list)
    """Given up."""
    allowed: bool = False
    """The breaker has let it through; how it goes is to be reported."""
    writers: dict[Attempt, Writer] = field(default_factory=dict)
    """Of the attempt that runs."""
    pages: list[int] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """No attempt runs."""
        return not self.writers
