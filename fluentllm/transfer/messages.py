"""What the two sides of a handoff say to each other besides the bytes: typed, bounded messages.

One handoff moves one prompt's KV from a prefill engine to a decode engine; each retry is a new *attempt*. Every message about
one names (handoff, attempt, both epochs), so that what belongs to an earlier attempt, or to an engine that has restarted, is
told apart and dropped. `frames` seals them. Torch-free, no pickle.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from ..core.types import SamplingParams
from .layout import KVLayout

MAX_PAGES = 2**17
MAX_GROUPS = 2**20
"""Groups in one attempt: of layers, for each chunk of the prompt."""
MAX_LAYERS = 1024
MAX_PROMPT = 768 * 1024
"""Bytes of a prompt in a message."""

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
    """Of its transport."""
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
    deadline: Annotated[float, Meta(ge=0, le=86400)]
    """Seconds from receipt until decode gives up."""
    checksums: bool = False


class Group(Struct, frozen=True, array_like=True, tag="group", forbid_unknown_fields=True):
    """As the transport's notification: these layers' KV of these pages is written. Prefill to decode, and the other way in
    answer to `Fetch`. Whoever is written to has everything when every group has come."""

    of: Attempt
    group: Annotated[int, Meta(ge=0, lt=MAX_GROUPS)]
    """Counts within the attempt."""
    first_page: Annotated[int, Meta(ge=0, le=MAX_PAGES)]
    """Index into `Reserve.pages`: a chunked prefill sends the groups of each chunk."""
    page_count: Annotated[int, Meta(ge=0, le=MAX_PAGES)]
    first_layer: Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
    layer_count: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    """Draft layers come last; with the very last layer the proposer's page states come."""
    rank: Annotated[int, Meta(ge=0, lt=1024)] = 0
    """Which rank of the source wrote it."""
    bytes: Number = 0
    checksum: Checksum | None = None
    groups: Annotated[int, Meta(ge=0, le=MAX_GROUPS)] = 0
    """How many the attempt has in all; 0 before the last, since their size follows what is measured. `FirstToken` says it
    too, for prompts that need none."""


class FirstToken(_Message, frozen=True, tag="first_token"):
    """Prefill to decode: what sampling after the prompt gave."""

    of: Attempt
    token: Annotated[int, Meta(ge=0, lt=2**31)]
    logprob: float | None = None
    rank: Number = 0
    top: Annotated[list[tuple[Number, float]], Meta(max_length=20)] = []
    cached_tokens: Number = 0
    """Of the prompt, that prefill had in its own cache."""
    groups: Annotated[int, Meta(ge=0, le=MAX_GROUPS)] = 0
    """How many there are: all have been submitted."""


class Compute(_Message, frozen=True, tag="compute"):
    """Decode to prefill, before a `Reserve`: this is the request, if no router has brought it. For an engine that takes the
    place of another, or of its own former life."""

    of: Attempt
    prompt: Annotated[bytes, Meta(max_length=MAX_PROMPT)]
    """Token ids, packed as `core.kv.events.encode_tokens` does."""
    params: SamplingParams
    priority: int = 0


class Fetch(_Message, frozen=True, tag="fetch"):
    """Prefill to decode, which has a prefix that prefill lacks: write these pages of it into mine. Answered by one `Group`
    and `Drained`, or by `Failed`."""

    of: Attempt
    first_page: Annotated[int, Meta(ge=0, le=MAX_PAGES)]
    """Counted within the prompt."""
    pages: Pages
    checksums: bool = False


class Cancel(_Message, frozen=True, tag="cancel"):
    """Either way: write no more of this attempt. Answered by `Drained`, however it stands."""

    of: Attempt
    reason: Reason = ""


class Drained(_Message, frozen=True, tag="drained"):
    """From who writes: nothing of this attempt (or of the `Fetch` in it) is under way, and nothing more will be."""

    of: Attempt
    groups: Number = 0
    """How many were sent."""


class Release(_Message, frozen=True, tag="release"):
    """Decode to prefill: everything arrived; the pages that prefill kept may go."""

    of: Attempt


class Failed(_Message, frozen=True, tag="failed"):
    """Either way: this attempt cannot be finished."""

    of: Attempt
    code: Id
    reason: Reason


Message = Describe | Refuse | Compute | Reserve | Fetch | FirstToken | Cancel | Drained | Release | Failed
