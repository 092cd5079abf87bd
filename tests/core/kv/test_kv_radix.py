"""The radix tree against a plain dict of prefixes: what it finds, what it keeps, what it gives up first."""

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kv_helpers import dump, hashes, prefixes

from fluentllm.core.kv import radix
from fluentllm.core.kv.events import KVEventLog, page_hashes
from fluentllm.core.kv.pages import IntegrityError, PageAllocator
from fluentllm.core.kv.radix import RadixTree


class Owner:
    """A request that holds pages: inserts, and goes away."""

    def __init__(self, tree: RadixTree) -> None:
        self.tree = tree
        self.lease = tree.allocator.lease("request", "owner")

    def insert(self, tokens: list[int]) -> list[int]:
        pages = self.tree.allocator.allocate(self.lease, len(tokens) // self.tree.page_size)
        assert pages is not None
        self.tree.insert(tokens[: len(pages) * self.tree.page_size], pages)
        return pages

    def leave(self) -> None:
        self.tree.allocator.release(self.lease)


def made(pages: int = 32, page_size: int = 2, *, listen: bool = False) -> RadixTree:
    return RadixTree(PageAllocator(pages), page_size, KVEventLog(page_size) if listen else None)


def cached(tree: RadixTree, tokens: list[int]) -> list[int]:
    """Insert and leave: only the tree holds the pages."""
    owner = Owner(tree)
    pages = owner.insert(tokens)
    owner.leave()
    return pages


# ------------------------------------------------------------------------------------------------------ finding and keeping
def test_the_longest_prefix_in_whole_pages_is_found():
    tree = made()
    pages = cached(tree, [1, 2, 3, 4, 5, 6])
    assert tree.match([1, 2, 3, 4, 5, 6, 7])[:2] == (pages, 6)
    assert tree.match([1, 2, 3, 4, 9, 9])[:2] == (pages[:2], 4)
    assert tree.match([1, 2, 3])[:2] == (pages[:1], 2)
    assert tree.match([1, 2, 3, 4, 5, 6], limit=2)[:2] == (pages[:2], 4)
    assert tree.match([1, 9, 3, 4])[:2] == ([], 0)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_less_than_a_page_is_no_match(tokens: list[int]):
    tree = made()
    assert tree.match(tokens)[:2] == ([], 0)
    cached(tree, [1, 2])
    assert tree.match(tokens)[:2] == ([], 0)
    assert tree.match([1, 2], limit=0)[:2] == ([], 0)
    assert tree.match([1, 2], limit=-1)[:2] == ([], 0)


def test_nothing_inserted_changes_nothing():
    tree = made()
    assert tree.insert([], []).added == []
    assert tree.pages == 0


def test_siblings_may_share_the_beginning_of_a_page():
    tree = made(page_size=3)
    first, second = cached(tree, [1, 2, 3, 4, 5, 6]), cached(tree, [1, 2, 9, 4, 5, 6])
    assert tree.match([1, 2, 3, 4, 5, 6]).pages == first
    assert tree.match([1, 2, 9, 4, 5, 6]).pages == second


def test_where_the_tree_has_a_page_it_keeps_its_own_and_takes_those_behind():
    tree = made()
    first = cached(tree, [1, 1, 2, 2])
    owner = Owner(tree)
    pages = tree.allocator.allocate(owner.lease, 4)
    assert pages is not None
    insertion = tree.insert([1, 1, 2, 2, 3, 3, 4, 4], pages)
    assert insertion.added == pages[2:]
    assert tree.match([1, 1, 2, 2, 3, 3, 4, 4]).pages == first + pages[2:]
    assert tree.insert([1, 1, 2, 2, 3, 3, 4, 4], pages).added == []
    tree.check()


def test_an_insert_can_go_on_where_the_last_one_ended_whatever_was_split_meanwhile():
    tree = made()
    owner = Owner(tree)
    pages = tree.allocator.allocate(owner.lease, 5)
    assert pages is not None
    node = tree.insert([1, 1, 2, 2, 3, 3], pages[:3]).node
    other = Owner(tree)
    other.insert([1, 1, 7, 7])
    node = tree.find(node, 2)
    assert node is not None
    insertion = tree.insert([3, 3, 4, 4, 5, 5], pages[2:], node, 2)
    assert (insertion.added, insertion.depth) == (pages[3:], 5)
    assert tree.match([1, 1, 2, 2, 3, 3, 4, 4, 5, 5]).pages == pages
    tree.check()


def test_a_place_within_a_run_that_others_made_longer_and_split_is_found_above_the_split():
    tree = made()
    owner = Owner(tree)
    pages = tree.allocator.allocate(owner.lease, 2)
    assert pages is not None
    node = tree.insert([1, 1], pages[:1]).node
    longer = cached(tree, [1, 1, 2, 2, 3, 3])
    Owner(tree).insert([1, 1, 2, 2, 7, 7])
    above = tree.find(node, 1)
    assert above is not None
    assert above is not node
    assert tree.insert([9, 9], pages[1:], above, 1).added == pages[1:]
    assert tree.match([1, 1, 9, 9]).pages == pages
    assert tree.match([1, 1, 2, 2, 3, 3]).pages == [pages[0], *longer[1:]]
    tree.check()


def test_an_evicted_place_is_not_found_again_even_if_other_tokens_grew_there():
    tree = made()
    owner = Owner(tree)
    node = tree.insert([1, 1, 2, 2, 3, 3], pages := tree.allocator.allocate(owner.lease, 3)).node
    owner.leave()
    assert tree.evict(1) == 1
    assert tree.match([1, 1, 2, 2, 3, 3]).pages == pages[:2]
    cached(tree, [1, 1, 2, 2, 9, 9])
    assert tree.find(node, 3) is None
    assert tree.find(node, 2) is not None
    tree.clear()
    assert tree.find(node, 2) is None
    assert tree.find(node, 0) is not None
    assert tree.find(None, 1) is None


def test_tokens_and_pages_must_fit():
    tree = made()
    with pytest.raises(ValueError, match="only full pages"):
        tree.insert([1, 2, 3], [1])
    with pytest.raises(ValueError, match="0"):
        RadixTree(PageAllocator(1), 0)


def test_a_page_that_nobody_holds_cannot_be_inserted():
    tree = made()
    with pytest.raises(IntegrityError, match="nobody holds"):
        tree.insert([1, 2], [5])


# ------------------------------------------------------------------------------------------------------------- eviction
def test_the_least_recently_used_leaf_goes_first_from_its_end():
    tree = made(page_size=1)
    cached(tree, [1, 2, 3, 4])
    cached(tree, [1, 2, 5])
    cached(tree, [8, 9])
    tree.match([1, 2, 3])
    assert tree.evict(1) == 1
    assert tree.match([1, 2, 3, 4]).length == 3
    assert tree.evict(3) == 3
    assert set(dump(tree)) == {(1,), (1, 2), (1, 2, 3)}


def test_leased_pages_are_never_evicted():
    tree = made()
    owner = Owner(tree)
    pages = owner.insert([1, 1, 2, 2])
    cached(tree, [1, 1, 2, 2, 3, 3])
    assert tree.evict(10) == 1
    assert tree.match([1, 1, 2, 2, 3, 3]).pages == pages
    owner.leave()
    assert tree.evict(10) == 2
    assert tree.pages == 0


def test_pages_above_a_leased_duplicate_can_be_had():
    """A sequence whose own pages doubled the tree's: its later pages lie below pages that only the tree holds."""
    tree = made(pages=8)
    cached(tree, [1, 1, 2, 2])
    owner = Owner(tree)
    owner.insert([1, 1, 2, 2, 3, 3])
    assert tree.allocator.evictable == 2
    assert tree.evict(2) == 2
    assert tree.match([1, 1]).length == 0
    tree.check()
    tree.allocator.check()
    assert tree.allocator.free == 8 - 3


def test_no_more_is_forgotten_above_leased_pages_than_is_needed():
    tree = made(pages=12)
    for token in (1, 2):
        cached(tree, [token, token])
        Owner(tree).insert([token, token, 3, 3])
    assert tree.evict(1) == 1
    assert set(dump(tree)) == {(2, 2), (2, 2, 3, 3)}
    tree.check()


def test_a_branch_above_leased_pages_is_not_evicted_while_leaves_suffice():
    tree = made(pages=12)
    cached(tree, [1, 1, 2, 2])
    cached(tree, [1, 1, 3, 3])
    owner = Owner(tree)
    pages = owner.insert([1, 1, 4, 4])
    tree.match([1, 1, 4, 4])
    assert tree.allocator.evictable == 3
    assert tree.evict(2) == 2
    assert tree.match([1, 1, 4, 4]).pages[1] == pages[1]
    assert tree.evict(1) == 1
    assert tree.pages == 0
    tree.check()


def test_evicting_nothing_does_nothing():
    tree = made()
    cached(tree, [1, 1, 2, 2])
    assert tree.evict(0) == 0
    assert tree.pages == 2


def test_clear_leaves_leased_pages_with_their_owner():
    tree = made(pages=8)
    owner = Owner(tree)
    owner.insert([1, 1, 2, 2])
    cached(tree, [1, 1, 5, 5, 6, 6])
    assert tree.clear() == 2
    assert (tree.pages, tree.allocator.free) == (0, 6)
    owner.leave()
    assert tree.allocator.free == 8
    tree.check()


# Few distinct tokens make shared prefixes; pages of two make ragged ends.
TOKENS = st.lists(st.integers(1, 2), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["insert", "match", "evict"]), TOKENS, st.integers(1, 4)), max_size=25))
def test_eviction_is_least_recently_used_page_by_page(steps: list[tuple[str, list[int], int]]):
    tree = made(pages=400)
    used: dict[tuple[int, ...], int] = {}
    for now, (verb, tokens, count) in enumerate(steps):
        if verb == "evict":
            expected = min(count, len(used))
            for _ in range(expected):
                leaves = [p for p in used if not any(q[: len(p)] == p and q != p for q in used)]
                del used[min(leaves, key=used.__getitem__)]
            assert tree.evict(count) == expected
        else:
            tree.match(tokens)
            if verb == "insert":
                cached(tree, tokens)
            for prefix in prefixes(tokens, 2):
                if verb == "insert" or prefix in used:
                    used[prefix] = now
        tree.check()
        assert set(dump(tree)) == set(used)


class Tree(RuleBasedStateMachine):
    """Random verbs against a dict of prefixes; a second view is rebuilt from the events alone."""

    def __init__(self) -> None:
        super().__init__()
        self.events = KVEventLog(2)
        self.tree = RadixTree(PageAllocator(20), 2, self.events)
        self.model: dict[tuple[int, ...], int] = {}
        self.router: set[int] = set()
        self.owners: list[Owner] = []

    @rule(data=st.data(), tokens=TOKENS)
    def insert(self, data: st.DataObject, tokens: list[int]) -> None:
        if self.model and data.draw(st.booleans()):
            tokens = [*data.draw(st.sampled_from(sorted(self.model))), *tokens[:4]]
        tokens = tokens[: len(tokens) // 2 * 2]
        owner = Owner(self.tree)
        pages = self.tree.allocator.allocate(owner.lease, len(tokens) // 2)
        if pages is None:
            owner.leave()
            return
        self.owners.append(owner)
        insertion = self.tree.insert(tokens, pages)
        new = {p: page for p, page in zip(prefixes(tokens, 2), pages, strict=True) if p not in self.model}
        assert insertion.added == list(new.values())
        assert insertion.depth == len(pages)
        self.model |= new

    @rule(tokens=TOKENS, lease=st.booleans())
    def match(self, tokens: list[int], lease: bool) -> None:
        expected = []
        for prefix in prefixes(tokens, 2):
            if prefix not in self.model:
                break
            expected.append(self.model[prefix])
        match = self.tree.match(tokens)
        assert match[:2] == (expected, 2 * len(expected))
        if lease:
            owner = Owner(self.tree)
            self.tree.allocator.share(owner.lease, match.pages)
            self.owners.append(owner)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.owners:
            self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))).leave()

    @rule(count=st.integers(0, 5))
    def evict(self, count: int) -> None:
        leased = set().union(*(owner.lease.pages for owner in self.owners))
        possible = len(set(self.model.values()) - leased)
        freed = self.tree.evict(count)
        assert freed >= min(count, possible)
        left = dump(self.tree)
        assert left.items() <= self.model.items()
        gone = set(self.model.values()) - set(left.values())
        assert len(gone - leased) == freed
        for owner in self.owners:
            assert all(self.tree.allocator.holders(page) > 0 for page in owner.lease.pages)
        if not any(page in leased for page in gone):
            assert freed == min(count, possible)
        self.model = left

    @rule()
    def clear(self) -> None:
        self.tree.clear()
        self.model = {}

    @invariant()
    def same(self) -> None:
        self.tree.check()
        self.tree.allocator.check()
        assert dump(self.tree) == self.model
        assert all(prefix[:-2] in self.model for prefix in self.model if len(prefix) > 2)
        for event in self.events.take():
            if event.kind == "cleared":
                self.router.clear()
            elif event.kind == "removed":
                assert self.router.issuperset(event.blocks)
                self.router.difference_update(event.blocks)
            else:
                assert self.router.isdisjoint(event.blocks)
                assert event.parent is None or event.parent in self.router
                assert event.blocks == page_hashes(event.tokens, event.page_size, event.parent)
                self.router.update(event.blocks)
        assert self.router == hashes(self.tree) == {page_hashes(list(prefix), 2)[-1] for prefix in self.model}


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# ----------------------------------------------------------------------------------------------------------------- cost
def calls(function: Callable[..., Any], *args: Any) -> int:
    """How many calls, of Python or C functions, it makes."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


def test_long_prompts_are_compared_in_a_few_calls_not_token_by_token():
    found = {}
    for length in (1_600, 160_000):
        tree = made(pages=2 * length // 16, page_size=16)
        tokens = [random.randrange(100_000) for _ in range(length)]
        lease = tree.allocator.lease("request", "a")
        pages = tree.allocator.allocate(lease, length // 16)
        other = list(tokens)
        other[length // 2] += 1
        found[length] = [
            calls(tree.insert, tokens, pages),
            calls(tree.match, list(tokens)),
            calls(tree.match, other),
            calls(tree.evict, 5),
        ]
    # A partial match bisects: 2 · log2(100) calls more for a run that is 100 times as long.
    assert all(long <= short + 16 for short, long in zip(found[1_600], found[160_000], strict=True)), found


def test_a_growing_sequence_stays_one_run():
    tree = made(pages=300, page_size=1)
    owner = Owner(tree)
    pages = tree.allocator.allocate(owner.lease, 300)
    assert pages is not None
    node = None
    for depth in range(300):
        node = tree.insert([depth], pages[depth : depth + 1], tree.find(node, depth), depth).node
    assert len(tree._order) == 1
    assert tree.match(list(range(300))).pages == pages


def test_no_hash_is_computed_when_nobody_listens(monkeypatch: pytest.MonkeyPatch):
    def never(*args: Any) -> list[int]:
        raise AssertionError("a hash was computed")

    monkeypatch.setattr(radix, "chain_hashes", never)
    cached(made(), [1, 2, 3, 4])
    with pytest.raises(AssertionError, match="was computed"):
        cached(made(listen=True), [1, 2, 3, 4])


@pytest.mark.parametrize("damage", ["order", "pages", "depth", "tokens", "children"])
def test_check_finds_damage(damage: str):
    tree = made()
    cached(tree, [1, 1, 2, 2])
    cached(tree, [1, 1, 3, 3])
    tree.check()
    lower, upper = next(iter(tree._order)), list(tree._order)[-1]
    if damage == "order":
        tree._order.move_to_end(upper, last=False)
    elif damage == "pages":
        lower.pages[0] = 9
    elif damage == "depth":
        lower.depth += 1
    elif damage == "tokens":
        lower.tokens[0] ^= 1
    else:
        upper.children.clear()
    with pytest.raises(IntegrityError):
        tree.check()
