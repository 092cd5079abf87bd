"""What the two sides of a handoff say to each other besides the bytes: typed, bounded messages.

One handoff moves one prompt's KV from a prefill engine to a decode engine; each retry is a new *attempt*. Every message about
one names (handoff, attempt, both epochs), so that what belongs to an earlier attempt, or to an engine that has restarted, is
told apart and dropped. `frames` seals them. Torch-free, no pickle.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from .layout import KVLayout

MAX_PAGES = 2**17
MAX_GROUPS = 1024
"""Groups of layers in one handoff."""

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Id = Annotated[str, Meta(min_length=1, max_length=128)]
Reason = Annotated[str, Meta(max_length=4096)]
Pages = Annotated[list[Annotated[int, Meta(ge=1, lt=2**31)]], Meta(max_length=MAX_PAGES)]
Checksum = Annotated[int, Meta(ge=0, lt=2**32)]


class _Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=False):
    """Field names travel along, so that a field may be added without a new version."""


class Attempt(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which handoff, which try, between which lives of the two engines."""

    handoff: Id
    attempt: Annotated[int, Meta(ge=0, lt=2**16)]
    source: Number
    """Epoch of the engine that prefills and writes."""
    target: Number
    """Epoch of the engine that decodes."""


class Describe(_Message, frozen=True, tag="describe"):
    """First on a connection, both ways: who speaks, how its KV lies, and how to reach its memory."""

    engine: Id
    epoch: Number
    layout: KVLayout
    transport: Annotated[bytes, Meta(max_length=64 * 1024)]
    """`KVTransport.metadata`."""


class Refuse(_Message, frozen=True, tag="refuse"):
    """No to a description, or to a request; nothing of it remains."""

    code: Id
    reason: Reason
    of: Attempt | None = None


class Reserve(_Message, frozen=True, tag="reserve"):
    """Decode to prefill: these pages are yours to write to."""

    of: Attempt
    prompt_tokens: Number
    prompt_hash: Annotated[bytes, Meta(max_length=32)]
    """SHA-256 of the token ids: both must speak of one prompt."""
    held_pages: Annotated[int, Meta(ge=0, le=MAX_PAGES)]
    """Leading pages that decode has already."""
    pages: Pages
    """For the rest of the prompt."""
    result_offset: Number
    """Where the last hidden state goes, bytes in the registered memory."""
    deadline: Annotated[float, Meta(ge=0, le=86400)]
    """Seconds from receipt until decode gives up."""
    checksums: bool = False


class Group(Struct, frozen=True, array_like=True, tag="group", forbid_unknown_fields=True):
    """Prefill to decode, as the transport's notification: these layers' KV of these pages is written."""

    of: Attempt
    group: Annotated[int, Meta(ge=0, lt=MAX_GROUPS)]
    groups: Annotated[int, Meta(ge=1, le=MAX_GROUPS)]
    first_page: Annotated[int, Meta(ge=0, le=MAX_PAGES)]
    """Index into `Reserve.pages`: a chunked prefill sends the groups of each chunk."""
    page_count: Annotated[int, Meta(ge=0, le=MAX_PAGES)]
    last_chunk: bool
    rank: Annotated[int, Meta(ge=0, lt=1024)] = 0
    """Which rank of the source wrote it."""
    bytes: Number = 0
    checksum: Checksum | None = None


class FirstToken(_Message, frozen=True, tag="first_token"):
    """Prefill to decode: what sampling after the prompt gave."""

    of: Attempt
    token: Annotated[int, Meta(ge=0, lt=2**31)]
    logprob: float | None = None
    rank: Number = 0
    top: Annotated[list[tuple[Number, float]], Meta(max_length=20)] = []
    hidden_bytes: Number = 0
    """Of the last hidden state at `Reserve.result_offset`; 0: none was sent."""
    finished: Annotated[str, Meta(max_length=16)] | None = None
    cached_tokens: Number = 0
    """Of the prompt, that prefill had in its own cache."""


class Cancel(_Message, frozen=True, tag="cancel"):
    """Either way: write no more of this attempt. Answered by `Drained`, however it stands."""

    of: Attempt
    reason: Reason = ""


class Drained(_Message, frozen=True, tag="drained"):
    """Prefill to decode: nothing of this attempt is under way, and nothing more will be."""

    of: Attempt


class Release(_Message, frozen=True, tag="release"):
    """Decode to prefill: everything arrived; the pages that prefill kept may go."""

    of: Attempt


class Failed(_Message, frozen=True, tag="failed"):
    """Either way: this attempt cannot be finished."""

    of: Attempt
    code: Id
    reason: Reason


class Alive(_Message, frozen=True, tag="alive"):
    """Either way, now and then."""

    epoch: Number
    open_handoffs: Number = 0


Message = Describe | Refuse | Reserve | FirstToken | Cancel | Drained | Release | Failed | Alive
