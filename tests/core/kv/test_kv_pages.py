"""Leases: who holds which page, and when a page is free."""

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fluentllm.core.kv.pages import IntegrityError, Lease, PageAllocator


def test_pages_are_handed_out_from_one_and_never_the_scratch_page():
    pages = PageAllocator(5)
    lease = pages.lease("request", "a")
    assert pages.allocate(lease, 5) == [1, 2, 3, 4, 5]
    assert pages.free == 0
    assert pages.allocate(lease, 1) is None
    assert pages.allocate(lease, 0) == []


def test_a_short_allocation_changes_nothing():
    pages = PageAllocator(3)
    lease = pages.lease("request", "a")
    assert pages.allocate(lease, 4) is None
    assert (pages.free, lease.pages) == (3, set())


def test_a_page_is_free_when_its_last_lease_is_gone():
    pages = PageAllocator(4)
    request, tree = pages.lease("request", "a"), pages.lease("tree", "tree")
    held = pages.allocate(request, 3)
    pages.share(tree, held[:2])
    assert (pages.leased("request"), pages.leased("tree"), pages.evictable) == (3, 2, 0)
    assert pages.release(request) == 1
    assert (pages.free, pages.evictable, pages.available) == (2, 2, 4)
    assert pages.drop(tree, held[:1]) == 1
    assert (pages.free, pages.evictable) == (3, 1)
    pages.check()


def test_only_draining_frees_the_pages_of_an_expired_remote_writer():
    pages = PageAllocator(4)
    writer, request = pages.lease("remote", "handoff 7"), pages.lease("request", "a")
    held = pages.allocate(writer, 2)
    pages.share(request, held)
    pages.quarantine(writer)
    assert pages.quarantined == 2
    with pytest.raises(IntegrityError, match=r"handoff 7.*quarantined"):
        pages.release(writer)
    with pytest.raises(IntegrityError, match="quarantined"):
        pages.drop(writer, held)
    pages.release(request)
    assert (pages.free, pages.quarantined) == (2, 2)
    assert pages.drained(writer) == 2
    assert (pages.free, pages.quarantined) == (4, 0)
    with pytest.raises(IntegrityError, match="not quarantined"):
        pages.drained(writer)


def test_a_remote_writer_that_finishes_hands_its_pages_to_the_request():
    pages = PageAllocator(4)
    writer, request = pages.lease("remote", "handoff"), pages.lease("request", "a")
    held = pages.allocate(writer, 3)
    pages.share(request, held)
    assert pages.release(writer) == 0
    assert (pages.leased("remote"), pages.leased("request")) == (0, 3)


@pytest.mark.parametrize("total", [0, -1])
def test_an_allocator_needs_pages(total: int):
    with pytest.raises(ValueError, match=str(total)):
        PageAllocator(total)


def test_misuse_is_an_integrity_error():
    pages = PageAllocator(4)
    a, b = pages.lease("request", "a"), pages.lease("request", "b")
    held = pages.allocate(a, 2)
    with pytest.raises(IntegrityError, match="which nobody holds"):
        pages.share(b, [4])
    with pytest.raises(IntegrityError, match="which nobody holds"):
        pages.share(b, [0])
    with pytest.raises(IntegrityError, match="which nobody holds"):
        pages.share(b, [5])
    with pytest.raises(IntegrityError, match="twice"):
        pages.share(a, held)
    with pytest.raises(IntegrityError, match="twice"):
        pages.share(b, [held[0], held[0]])
    with pytest.raises(IntegrityError, match="does not hold"):
        pages.drop(b, held)
    with pytest.raises(IntegrityError, match="does not hold"):
        pages.drop(a, [held[0], held[0]])
    with pytest.raises(IntegrityError, match="-1"):
        pages.allocate(a, -1)
    with pytest.raises(IntegrityError, match="only a remote"):
        pages.quarantine(a)
    pages.release(a)
    with pytest.raises(IntegrityError, match="not an open lease"):
        pages.allocate(a, 1)
    with pytest.raises(IntegrityError, match="not an open lease"):
        pages.allocate(PageAllocator(4).lease("request", "elsewhere"), 1)
    pages.check()
    assert pages.free == 4


@pytest.mark.parametrize("field", ["_holders", "_by_kind", "_free", "_leased", "_evictable"])
def test_check_finds_every_kind_of_broken_count(field: str):
    pages = PageAllocator(4)
    pages.allocate(pages.lease("request", "a"), 2)
    pages.check()
    value = getattr(pages, field)
    if field == "_evictable":
        pages._evictable += 1
    elif field == "_free":
        value.append(value[0])
    elif field == "_holders":
        value[1] += 1
    elif field == "_leased":
        value["sending"] += 1
    else:
        value["sending"][1] += 1
    with pytest.raises(IntegrityError):
        pages.check()


class Leases(RuleBasedStateMachine):
    """Random verbs against a model that keeps one set of pages a lease."""

    TOTAL = 9

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(self.TOTAL)
        self.model: dict[Lease, set[int]] = {}

    def pick(self, data: st.DataObject) -> Lease | None:
        open_leases = [lease for lease in self.model if not lease.quarantined]
        return data.draw(st.sampled_from(open_leases)) if open_leases else None

    @rule(kind=st.sampled_from(["request", "tree", "remote", "sending"]))
    def open(self, kind: str) -> None:
        if len(self.model) < 6:
            self.model[self.pages.lease(kind, kind)] = set()

    @rule(data=st.data(), count=st.integers(0, 5))
    def allocate(self, data: st.DataObject, count: int) -> None:
        lease = self.pick(data)
        if lease is None:
            return
        free = self.TOTAL - len(set().union(*self.model.values()))
        got = self.pages.allocate(lease, count)
        assert (got is None) == (count > free)
        if got is not None:
            assert len(got) == len(set(got)) == count
            assert all(1 <= page <= self.TOTAL and all(page not in held for held in self.model.values()) for page in got)
            self.model[lease] |= set(got)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        if lease is not None:
            others = set().union(*self.model.values()) - self.model[lease]
            chosen = data.draw(st.lists(st.sampled_from(sorted(others)), unique=True)) if others else []
            self.pages.share(lease, chosen)
            self.model[lease] |= set(chosen)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        if lease is not None and self.model[lease]:
            chosen = data.draw(st.lists(st.sampled_from(sorted(self.model[lease])), unique=True))
            before = self.pages.free
            freed = self.pages.drop(lease, chosen)
            self.model[lease] -= set(chosen)
            assert self.pages.free == before + freed

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        if lease is not None:
            self.pages.release(lease)
            del self.model[lease]

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        if lease is not None and lease.kind == "remote":
            self.pages.quarantine(lease)

    @rule()
    def drain(self) -> None:
        for lease in [lease for lease in self.model if lease.quarantined]:
            self.pages.drained(lease)
            del self.model[lease]

    @invariant()
    def counts(self) -> None:
        self.pages.check()
        held = set().union(*self.model.values()) if self.model else set()
        by_kind = {kind: set() for kind in ("request", "tree", "remote", "sending")}
        for lease, pages in self.model.items():
            assert lease.pages == pages
            by_kind[lease.kind] |= pages
        assert self.pages.free == self.TOTAL - len(held)
        assert {kind: self.pages.leased(kind) for kind in by_kind} == {kind: len(pages) for kind, pages in by_kind.items()}
        others = set().union(*(pages for kind, pages in by_kind.items() if kind != "tree"))
        assert self.pages.evictable == len(by_kind["tree"] - others)
        assert self.pages.quarantined == len(set().union(*(p for lease, p in self.model.items() if lease.quarantined)))


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
