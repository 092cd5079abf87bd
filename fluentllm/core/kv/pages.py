"""The page allocator: who holds which page of the KV pool. The radix tree and `KVCache` stand on it, and so do handoffs.

Ownership is by leases. A page may be held by many leases and is free when none is left; nobody frees a page directly.
Pages are the numbers 1 … total. Page 0 is the scratch page that inert rows write to: it is never handed out.
Torch-free; every verb costs O(pages touched).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

LeaseKind = Literal["request", "tree", "remote", "sending"]
"""Who holds pages: a running request (until no step in flight names it), the radix tree, a writer on another machine, a handoff
that sends them there."""


class IntegrityError(RuntimeError):
    """The bookkeeping of pages is broken. Always a bug, never a user's fault."""


class Lease:
    """Pages held by one owner, each at most once. Made by `PageAllocator.lease`; read-only outside of it."""

    __slots__ = ("closed", "kind", "label", "pages", "quarantined")

    def __init__(self, kind: LeaseKind, label: str) -> None:
        self.kind = kind
        self.label = label
        """For error texts: a request's id, a handoff's."""
        self.pages: set[int] = set()
        self.quarantined = False
        self.closed = False

    def __repr__(self) -> str:
        state = ", quarantined" if self.quarantined else ", closed" if self.closed else ""
        return f"<{self.kind} lease {self.label!r}: {len(self.pages)} pages{state}>"


class PageAllocator:
    """Hands out pages 1 … `pages` under leases.

    Raises `IntegrityError` for what only a bug can cause: a page shared that is free, dropped by who does not hold it,
    a lease used after its release.
    """

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a page allocator needs at least 1 page, not {pages}")
        self.total = pages
        self._free = list(range(pages, 0, -1))
        self._holders = [0] * (pages + 1)
        self._by_kind = {kind: [0] * (pages + 1) for kind in get_args(LeaseKind)}
        self._leased = dict.fromkeys(self._by_kind, 0)
        self._evictable = 0
        self._leases: dict[Lease, None] = {}

    # ---------------------------------------------------------------------------------------------------------- counters
    @property
    def free(self) -> int:
        """Pages that no lease holds."""
        return len(self._free)

    @property
    def evictable(self) -> int:
        """Pages that only the tree holds: what its eviction can free."""
        return self._evictable

    @property
    def available(self) -> int:
        """Free now, or after eviction."""
        return len(self._free) + self._evictable

    @property
    def quarantined(self) -> int:
        """Pages that an expired remote writer may still write to."""
        pages: set[int] = set()
        for lease in self._leases:
            if lease.quarantined:
                pages |= lease.pages
        return len(pages)

    def leased(self, kind: LeaseKind) -> int:
        """Pages that at least one lease of this kind holds."""
        return self._leased[kind]

    def holders(self, page: int) -> int:
        """How many leases hold the page."""
        return self._holders[page]

    def leases(self, kind: LeaseKind | None = None) -> list[Lease]:
        """Open leases, oldest first."""
        return [lease for lease in self._leases if kind is None or lease.kind == kind]

    # ------------------------------------------------------------------------------------------------------------- verbs
    def lease(self, kind: LeaseKind, label: str) -> Lease:
        """A new lease that holds nothing yet."""
        lease = Lease(kind, label)
        self._leases[lease] = None
        return lease

    def allocate(self, lease: Lease, count: int) -> list[int] | None:
        """Give `count` free pages to the lease; None, and nothing changed, if there are fewer."""
        self._writable(lease)
        if count < 0:
            raise IntegrityError(f"{lease} asks for {count} pages")
        if count > len(self._free):
            return None
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        self._hold(lease, pages)
        return pages

    def share(self, lease: Lease, pages: Collection[int]) -> None:
        """Let the lease hold pages too that others hold already."""
        self._writable(lease)
        for page in pages:
            if not 0 < page <= self.total or self._holders[page] == 0:
                raise IntegrityError(f"{lease} would share page {page}, which nobody holds")
        if not lease.pages.isdisjoint(pages) or len(set(pages)) != len(pages):
            raise IntegrityError(f"{lease} would hold a page twice: {sorted(lease.pages.intersection(pages))[:8]}")
        self._hold(lease, pages)

    def drop(self, lease: Lease, pages: Collection[int]) -> int:
        """Take pages away from the lease. Returns how many became free."""
        self._writable(lease)
        missing = set(pages) - lease.pages
        if missing or len(set(pages)) != len(pages):
            raise IntegrityError(f"{lease} would drop pages that it does not hold: {sorted(missing)[:8]}")
        return self._let_go(lease, pages)

    def release(self, lease: Lease) -> int:
        """Drop everything and close the lease. Returns how many pages became free."""
        self._writable(lease)
        return self._close(lease)

    def quarantine(self, lease: Lease) -> None:
        """A remote writer's lease has expired. No timer frees its pages: the writer may write yet, until `drained`."""
        self._writable(lease)
        if lease.kind != "remote":
            raise IntegrityError(f"only a remote writer's lease can be quarantined, not {lease}")
        lease.quarantined = True

    def drained(self, lease: Lease) -> int:
        """The writer acknowledged that this attempt is drained, or its connection and memory registration are torn
        down: end the quarantine and the lease. Returns how many pages became free."""
        if not lease.quarantined:
            raise IntegrityError(f"{lease} is not quarantined")
        lease.quarantined = False
        return self._close(lease)

    def check(self) -> None:
        """Recount everything, O(total). Raises `IntegrityError` with what differs."""
        by_kind = {kind: [0] * (self.total + 1) for kind in self._by_kind}
        for lease in self._leases:
            if lease.closed:
                raise IntegrityError(f"{lease} is closed but registered")
            for page in lease.pages:
                if not 0 < page <= self.total:
                    raise IntegrityError(f"{lease} holds page {page}, outside 1 … {self.total}")
                by_kind[lease.kind][page] += 1
        holders = [sum(counts) for counts in zip(*by_kind.values(), strict=True)]
        for page in range(self.total + 1):
            if holders[page] != self._holders[page]:
                raise IntegrityError(f"page {page} has {holders[page]} holders, counted as {self._holders[page]}")
        if by_kind != self._by_kind:
            raise IntegrityError("holders by kind differ from the leases")
        free = {page for page in range(1, self.total + 1) if holders[page] == 0}
        if set(self._free) != free or len(self._free) != len(free):
            raise IntegrityError(f"{len(free)} pages have no holder, the free list has {len(self._free)}")
        leased = {kind: sum(count > 0 for count in counts) for kind, counts in by_kind.items()}
        if leased != self._leased:
            raise IntegrityError(f"leased pages are {leased}, counted as {self._leased}")
        evictable = sum(held > 0 and held == tree for held, tree in zip(holders, by_kind["tree"], strict=True))
        if evictable != self._evictable:
            raise IntegrityError(f"{evictable} pages are held by the tree only, counted as {self._evictable}")

    # ----------------------------------------------------------------------------------------------------------- helpers
    def _writable(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise IntegrityError(f"{lease} is not an open lease of this allocator")
        if lease.quarantined:
            raise IntegrityError(f"{lease} is quarantined: only `drained` ends it")

    def _hold(self, lease: Lease, pages: Iterable[int]) -> None:
        lease.pages.update(pages)
        holders, of_kind, tree = self._holders, self._by_kind[lease.kind], self._by_kind["tree"]
        leased = evictable = 0
        is_tree = lease.kind == "tree"
        for page in pages:
            held = holders[page]
            if is_tree:
                evictable += held == 0
            else:
                evictable -= held > 0 and held == tree[page]
            leased += of_kind[page] == 0
            of_kind[page] += 1
            holders[page] = held + 1
        self._leased[lease.kind] += leased
        self._evictable += evictable

    def _let_go(self, lease: Lease, pages: Collection[int]) -> int:
        """`pages` may be `lease.pages` itself."""
        holders, of_kind, tree = self._holders, self._by_kind[lease.kind], self._by_kind["tree"]
        leased = evictable = 0
        is_tree = lease.kind == "tree"
        freed = []
        for page in pages:
            held = holders[page] - 1
            holders[page] = held
            of_kind[page] -= 1
            leased += of_kind[page] == 0
            if held == 0:
                freed.append(page)
                evictable -= is_tree
            elif not is_tree:
                evictable += held == tree[page]
        self._leased[lease.kind] -= leased
        self._evictable += evictable
        self._free.extend(freed)
        lease.pages.difference_update(pages)
        return len(freed)

    def _close(self, lease: Lease) -> int:
        freed = self._let_go(lease, lease.pages)
        del self._leases[lease]
        lease.closed = True
        return freed
