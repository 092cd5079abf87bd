"""What the prefill side knows of one handoff, and of each attempt at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .watch import Progress

if TYPE_CHECKING:
    import asyncio

    from ...core.kv.pages import Lease
    from ...core.sequence import Sequence
    from ...transfer.messages import Attempt, Reserve
    from .exchange import Connection


@dataclass(slots=True)
class Chunk:
    """Pages, counted within the prompt, that are complete when a pass is."""

    first: int
    end: int
    progress: Progress


@dataclass(slots=True, eq=False)
class Sending:
    """One attempt."""

    of: Attempt
    ask: Reserve
    connection: Connection
    sent: list[int] = field(default_factory=list)
    """Layers sent of each chunk."""
    transfers: dict[int, float] = field(default_factory=dict)
    """Under way: number → when it was submitted."""
    groups: int = 0
    """Submitted."""
    told: bool = False
    """The first token has been sent."""
    over: bool = False
    """No more is submitted."""
    doubtful: bool = False
    """A transfer failed: nobody knows whether its bytes still come, so it is never drained."""


@dataclass(slots=True, eq=False)
class Early:
    """An ask that came before the request."""

    connection: Connection
    ask: Reserve
    timer: asyncio.TimerHandle


@dataclass(slots=True, eq=False)
class Outgoing:
    """One handoff."""

    id: str
    sequence: Sequence
    tokens: int
    digest: bytes
    pages: list[int] = field(default_factory=list)
    lease: Lease | None = None
    chunks: list[Chunk] = field(default_factory=list)
    first: tuple[int, float | None, int, list[tuple[int, float]]] | None = None
    """Token, logprob, rank, alternatives."""
    sendings: dict[int, Sending] = field(default_factory=dict)
    """The newest attempt of each rank of decode."""
    released: set[int] = field(default_factory=set)
    """Ranks of decode that have everything."""
    told: str | None = None
    """Id of the request, where decode told it and no client of ours."""
    timer: asyncio.TimerHandle | None = None
    computing: bool = True
    closed: bool = False
