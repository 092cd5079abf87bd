"""The KV cache as the scheduler sees it: pages of sequences and of the prefix cache, in terms of `Sequence`.

Life of a sequence: `admit` (match the radix tree, lease what it has, allocate for the first chunk), `reserve` before every
step that may write further, `publish` what is full, written and collected, `release`. Torch-free: the tensors are in
`pool.KVPool`, indexed by the same page numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .events import KVEventLog
from .pages import IntegrityError, Lease, PageAllocator
from .radix import Node, RadixTree

if TYPE_CHECKING:
    from ..sequence import Sequence
    from ..types import KVEvent


@dataclass(slots=True)
class _Holding:
    lease: Lease
    node: Node | None
    """Where the sequence's published prefix ends in the tree."""


@dataclass(slots=True, eq=False)
class Prefix:
    """Whole pages that begin a prompt: some cached, the others on their way."""

    tokens: list[int]
    held: list[int]
    new: list[int]
    lease: Lease
    writer: Lease
    """Of kind `remote`, over `new`."""


class KVCache:
    """Pages 1 … `pages` of `page_size` tokens each; page 0 is scratch. Raises `IntegrityError` for a caller's bugs."""

    def __init__(self, pages: int, page_size: int, prefix_cache: bool, listen: bool = False) -> None:
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.allocator = PageAllocator(pages)
        """The leases; handoffs take theirs here."""
        self._events = KVEventLog(page_size) if listen else None
        self._tree = RadixTree(self.allocator, page_size, self._events)
        self._holdings: dict[Sequence, _Holding] = {}

    # ---------------------------------------------------------------------------------------------------------- counters
    @property
    def pages_total(self) -> int:
        return self.allocator.total

    @property
    def pages_free(self) -> int:
        """Held by nobody."""
        return self.allocator.free

    @property
    def pages_cached(self) -> int:
        """Held by the radix tree (some also by requests)."""
        return self._tree.pages

    @property
    def pages_leased(self) -> int:
        """Held by requests, remote writers or handoffs that send them (some also by the radix tree)."""
        return self.allocator.total - self.allocator.available

    @property
    def pages_available(self) -> int:
        """Free now, or after eviction: what the next `reserve` can have at most. O(1)."""
        return self.allocator.available

    # ---------------------------------------------------------------------------------------------------------- sequences
    def pages_for(self, tokens: int) -> int:
        """Pages that this many tokens take."""
        return -(-tokens // self.page_size)

    def can_ever_fit(self, tokens: int) -> bool:
        """Whether a sequence of this length fits when it is alone."""
        return self.pages_for(tokens) <= self.allocator.total

    def admit(self, sequence: Sequence, first_tokens: int) -> bool:
        """Lease the cached prefix of `sequence.tokens` and pages for `first_tokens` tokens behind it (or for all of its
        tokens, if fewer are left).

        Sets pages, published, prefilled and, before its first step, cached_tokens. False, and nothing changed, if pages
        are short. The last token is never taken from the cache, since its logits are needed; nothing is, if prompt
        logprobs are.
        """
        if sequence in self._holdings:
            raise IntegrityError(f"request {sequence.request.id} is admitted already")
        length = len(sequence.tokens)
        if self._hopeless(length, first_tokens):
            return False
        lease = self.allocator.lease("request", sequence.request.id)
        cached, node = 0, None
        pages: list[int] = []
        if self.prefix_cache and sequence.request.params.prompt_logprobs is None:
            pages, cached, node = self._tree.match(sequence.tokens, (length - 1) // self.page_size)
            self.allocator.share(lease, pages)
        new = self._allocate(lease, self.pages_for(min(cached + first_tokens, length)) - len(pages))
        if new is None:
            self.allocator.release(lease)
            return False
        self._holdings[sequence] = _Holding(lease, node)
        sequence.published = len(pages)
        sequence.pages = pages + new
        sequence.prefilled = cached
        if sequence.last_step < 0:
            sequence.cached_tokens = cached
        return True

    def expect(self, sequence: Sequence, tokens: int, label: str) -> Lease | None:
        """As `admit` and `reserve(tokens)`, for a sequence whose tokens' KV a remote writer brings. Returns the writer's lease,
        over the pages of these tokens that the tree did not have; None, and nothing changed, if pages are short."""
        if not self.admit(sequence, len(sequence.tokens)):
            return None
        if self.reserve(sequence, tokens) is None:
            self.release(sequence)
            return None
        lease = self.allocator.lease("remote", label)
        self.allocator.share(lease, sequence.pages[sequence.published : self.pages_for(len(sequence.tokens))])
        return lease

    def cached_pages(self, tokens: list[int]) -> int:
        """How many whole pages of this prefix the tree has."""
        return len(self._tree.match(tokens).pages) if self.prefix_cache else 0

    def expect_prefix(self, tokens: list[int], label: str) -> Prefix | None:
        """Pages for a prefix of whole pages whose KV a remote writer brings, as far as the tree does not have it. None, and
        nothing changed, if pages are short or the tree is off. End it by `keep_prefix` or `drop_prefix`, and its `writer` as
        in `expect`."""
        if not self.prefix_cache:
            return None
        lease = self.allocator.lease("request", label)
        held = self._tree.match(tokens).pages
        self.allocator.share(lease, held)
        new = self._allocate(lease, len(tokens) // self.page_size - len(held))
        if new is None:
            self.allocator.release(lease)
            return None
        writer = self.allocator.lease("remote", label)
        self.allocator.share(writer, new)
        return Prefix(tokens, held, new, lease, writer)

    def keep_prefix(self, prefix: Prefix) -> None:
        """It has come: it enters the tree. The prefix is not used any more."""
        self._tree.insert(prefix.tokens, prefix.held + prefix.new)
        self.allocator.release(prefix.lease)

    def drop_prefix(self, prefix: Prefix) -> None:
        """It does not come. The prefix is not used any more."""
        self.allocator.release(prefix.lease)

    def reserve(self, sequence: Sequence, tokens: int) -> list[int] | None:
        """Make sure that there are pages for `tokens` tokens. Returns the new ones, which are at the end of
        `sequence.pages` now; None, and nothing changed, if pages are short."""
        new = self._allocate(self._holding(sequence).lease, self.pages_for(tokens) - len(sequence.pages))
        if new:
            sequence.pages += new
        return new

    def publish(self, sequence: Sequence, written_tokens: int) -> None:
        """Put the full pages among the first `written_tokens` tokens into the radix tree. Tokens that have not been
        collected do not count. Where the tree has a page for the same prefix, the sequence goes on with its own."""
        holding = self._holding(sequence)
        full = min(written_tokens, len(sequence.tokens)) // self.page_size
        if not self.prefix_cache or full <= sequence.published:
            return
        if full > len(sequence.pages):
            raise IntegrityError(f"request {sequence.request.id} has written {full} pages and holds {len(sequence.pages)}")
        depth = sequence.published
        node = self._tree.find(holding.node, depth)
        if node is None:
            depth = 0
        tokens = sequence.tokens[depth * self.page_size : full * self.page_size]
        holding.node = self._tree.insert(tokens, sequence.pages[depth:full], node, depth).node
        sequence.published = full

    def release(self, sequence: Sequence) -> None:
        """Drop its lease; pages that the tree holds stay cached. Nothing happens if it was never admitted."""
        holding = self._holdings.pop(sequence, None)
        if holding is not None:
            self.allocator.release(holding.lease)
        sequence.pages = []
        sequence.published = 0

    # --------------------------------------------------------------------------------------------------------- everything
    def clear(self) -> None:
        """Forget the prefix cache. Running sequences keep their pages, and publish again from their start."""
        self._tree.clear()

    def take_events(self) -> list[KVEvent]:
        """What changed in the prefix cache since the last call; always empty unless made with `listen`."""
        return self._events.take() if self._events is not None else []

    def check_idle(self) -> None:
        """With no request left: leased = what the tree holds, quarantined = 0. O(1) unless something is wrong.
        Raises `IntegrityError` with the numbers and the leases that are left."""
        left = [lease for lease in self.allocator.leases() if lease.kind != "tree"]
        if left or self._holdings or self.allocator.free + self.pages_cached != self.allocator.total:
            raise IntegrityError(
                f"idle, but of {self.pages_total} pages {self.pages_free} are free, {self.pages_cached} cached, "
                f"{self.pages_leased} leased, {self.allocator.quarantined} quarantined; leases left: {left[:8]}"
            )

    def check(self) -> None:
        """Verify every count and the tree, O(pages). Raises `IntegrityError`."""
        self.allocator.check()
        self._tree.check()
        for sequence, holding in self._holdings.items():
            if set(sequence.pages) != holding.lease.pages or len(sequence.pages) != len(holding.lease.pages):
                raise IntegrityError(f"request {sequence.request.id} lists other pages than {holding.lease} holds")

    # ------------------------------------------------------------------------------------------------------------ helpers
    def _holding(self, sequence: Sequence) -> _Holding:
        try:
            return self._holdings[sequence]
        except KeyError:
            raise IntegrityError(f"request {sequence.request.id} is not admitted") from None

    def _hopeless(self, length: int, first_tokens: int) -> bool:
        """Whether pages are short however much is cached. O(1): a request that waits is asked for again every step."""
        # A cached page costs nothing only if a request holds it too; else leasing it takes it from what is evictable.
        shared = min(self.pages_cached - self.allocator.evictable, max(length - 1, 0) // self.page_size)
        return self.pages_for(min(first_tokens, length)) - shared > self.allocator.available

    def _allocate(self, lease: Lease, count: int) -> list[int] | None:
        if count <= 0:
            return []
        if count > self.allocator.available:
            return None
        short = count - self.allocator.free
        if short > 0:
            self._tree.evict(short)
        return self.allocator.allocate(lease, count)
