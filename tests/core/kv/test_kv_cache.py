"""The façade: sequences come, grow, publish and go; what a page holds is checked against a pool made of Python tuples."""

import random

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kv_helpers import dump, prefixes, sequence

from fluentllm.core.kv import radix
from fluentllm.core.kv.cache import KVCache
from fluentllm.core.kv.pages import IntegrityError
from fluentllm.core.sequence import Sequence


def ran(cache: KVCache, tokens: list[int]) -> Sequence:
    """Run a sequence from its admission to its end."""
    one = sequence(tokens)
    assert cache.admit(one, len(tokens))
    cache.publish(one, len(tokens))
    cache.release(one)
    return one


# ------------------------------------------------------------------------------------------------------------ admission
def test_a_prompt_is_admitted_with_pages_for_its_first_chunk():
    cache = KVCache(8, 4, prefix_cache=True)
    one = sequence(list(range(20)))
    assert cache.admit(one, 6)
    assert (one.pages, one.prefilled, one.published, one.cached_tokens) == ([1, 2], 0, 0, 0)
    assert (cache.pages_free, cache.pages_leased, cache.pages_cached) == (6, 2, 0)


def test_a_chunk_longer_than_the_sequence_takes_no_more_than_the_sequence():
    cache = KVCache(8, 4, prefix_cache=True)
    one = sequence(list(range(5)))
    assert cache.admit(one, 512)
    assert len(one.pages) == 2


def test_a_cached_prefix_is_not_computed_again():
    cache = KVCache(8, 4, prefix_cache=True)
    ran(cache, list(range(10)))
    one = sequence([*range(8), 100, 101])
    assert cache.admit(one, 2)
    assert (one.prefilled, one.cached_tokens, one.published) == (8, 8, 2)
    assert len(one.pages) == 3
    assert (cache.pages_leased, cache.pages_cached) == (3, 2)


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_token_is_always_computed(length: int, cached: int):
    cache = KVCache(8, 4, prefix_cache=True)
    ran(cache, list(range(12)))
    one = sequence(list(range(length)))
    assert cache.admit(one, length)
    assert one.prefilled == cached


def test_prompt_logprobs_read_no_cache_but_fill_it():
    cache = KVCache(8, 4, prefix_cache=True)
    first = sequence(list(range(9)), prompt_logprobs=0)
    assert cache.admit(first, 9)
    cache.publish(first, 9)
    again = sequence(list(range(9)), prompt_logprobs=0)
    assert cache.admit(again, 9)
    assert again.prefilled == 0
    cache.release(first)
    cache.release(again)
    plain = sequence(list(range(9)))
    assert cache.admit(plain, 9)
    assert plain.prefilled == 8


def test_without_a_prefix_cache_nothing_is_kept():
    cache = KVCache(8, 4, prefix_cache=False)
    ran(cache, list(range(12)))
    assert (cache.pages_cached, cache.pages_free) == (0, 8)
    one = sequence(list(range(12)))
    assert cache.admit(one, 12)
    assert one.prefilled == 0


def test_cached_tokens_are_those_of_the_first_admission():
    cache = KVCache(8, 4, prefix_cache=True)
    one = sequence(list(range(9)))
    assert cache.admit(one, 9)
    one.last_step = 0
    cache.publish(one, 9)
    cache.release(one)
    assert cache.admit(one, 9)
    assert (one.prefilled, one.cached_tokens) == (8, 0)


def test_a_refused_admission_changes_nothing():
    cache = KVCache(4, 4, prefix_cache=True)
    ran(cache, list(range(5)))
    other = sequence(list(range(50, 60)), "other")
    assert cache.admit(other, 10)
    one = sequence(list(range(9)))
    before = (cache.pages_free, cache.pages_cached, cache.pages_leased)
    # The first page is cached, but of the other two that it needs only one is free.
    assert (before, cache.pages_available) == ((0, 1, 3), 1)
    assert not cache.admit(one, 9)
    assert (cache.pages_free, cache.pages_cached, cache.pages_leased) == before
    assert (one.pages, one.prefilled, one.published) == ([], 0, 0)
    cache.release(one)
    cache.release(other)
    assert cache.admit(one, 9)
    cache.check()


def test_pages_that_others_lease_cost_a_newcomer_nothing():
    cache = KVCache(4, 4, prefix_cache=True)
    first = sequence(list(range(12)))
    assert cache.admit(first, 12)
    cache.publish(first, 12)
    assert cache.pages_available == 1
    second = sequence([*range(12), 13])
    assert cache.admit(second, 13)
    assert second.prefilled == 12
    assert cache.pages_available == 0


def test_a_request_that_cannot_fit_yet_is_refused_without_looking_at_its_tokens(monkeypatch: pytest.MonkeyPatch):
    cache = KVCache(4, 4, prefix_cache=True)
    first = sequence(list(range(12)))
    assert cache.admit(first, 12)
    cache.publish(first, 4)
    waiting = sequence(list(range(50, 60)))

    def never(tokens: list[int]) -> bytes:
        raise AssertionError("the tree was searched")

    monkeypatch.setattr(radix, "encode_tokens", never)
    assert not cache.admit(waiting, 10)


def test_what_a_request_is_about_to_use_is_not_evicted_for_it():
    cache = KVCache(4, 4, prefix_cache=True)
    ran(cache, list(range(9)))
    ran(cache, list(range(100, 105)))
    one = sequence(list(range(16)))
    assert cache.admit(one, 16)
    assert (one.prefilled, len(one.pages)) == (8, 4)
    assert cache.pages_cached == 2
    cache.check()


def test_pages_needed_at_most():
    cache = KVCache(4, 4, prefix_cache=True)
    assert cache.can_ever_fit(16)
    assert not cache.can_ever_fit(17)
    assert cache.pages_for(0) == 0


# --------------------------------------------------------------------------------------------------------- growth, the end
def test_reserve_adds_what_is_missing():
    cache = KVCache(4, 4, prefix_cache=True)
    one = sequence([1, 2, 3])
    assert cache.admit(one, 3)
    assert cache.reserve(one, 4) == []
    assert cache.reserve(one, 9) == [2, 3]
    assert one.pages == [1, 2, 3]
    assert cache.reserve(one, 17) is None
    assert one.pages == [1, 2, 3]


def test_only_full_pages_of_collected_tokens_are_published():
    cache = KVCache(8, 4, prefix_cache=True)
    one = sequence(list(range(7)))
    assert cache.admit(one, 7)
    assert cache.reserve(one, 12) is not None
    cache.publish(one, 3)
    assert one.published == 0
    # The device is ahead: 12 tokens written, 7 collected.
    cache.publish(one, 12)
    assert one.published == cache.pages_cached == 1
    one.tokens.append(7)
    cache.publish(one, 12)
    assert one.published == cache.pages_cached == 2


def test_two_that_compute_the_same_at_once_keep_their_own_pages():
    cache = KVCache(12, 2, prefix_cache=True)
    first, second = sequence([1, 2, 3, 4, 5], "a"), sequence([1, 2, 3, 4, 5], "b")
    assert cache.admit(first, 5)
    assert cache.admit(second, 5)
    cache.publish(first, 5)
    cache.publish(second, 5)
    assert set(first.pages).isdisjoint(second.pages)
    assert cache.pages_cached == 2
    second.tokens += [6, 7]
    assert cache.reserve(second, 7) is not None
    cache.publish(second, 6)
    third = sequence([1, 2, 3, 4, 5, 6, 7])
    assert cache.admit(third, 1)
    assert third.pages[:3] == [*first.pages[:2], second.pages[2]]
    cache.check()


def test_a_sequence_that_is_alone_can_have_every_page():
    """Even where its own pages double those of the tree, which lie above others of its own."""
    cache = KVCache(6, 2, prefix_cache=True)
    first, second = sequence([1, 2, 3, 4, 5], "a"), sequence([1, 2, 3, 4, 5], "b")
    assert cache.admit(first, 5)
    assert cache.admit(second, 5)
    cache.publish(first, 4)
    cache.release(first)
    second.tokens.append(6)
    cache.publish(second, 6)
    assert cache.pages_available == 3
    assert cache.reserve(second, 12) is not None
    assert cache.pages_free == 0
    second.tokens += [7, 8]
    cache.publish(second, 8)
    assert dump(cache._tree) == dict(zip(prefixes(second.tokens, 2), second.pages, strict=False))
    cache.check()


def test_a_released_sequence_leaves_its_prefix_behind():
    cache = KVCache(8, 4, prefix_cache=True)
    one = ran(cache, list(range(10)))
    assert (one.pages, one.published) == ([], 0)
    assert (cache.pages_free, cache.pages_cached, cache.pages_leased) == (6, 2, 0)
    cache.release(one)
    cache.check_idle()
    cache.clear()
    cache.check_idle()
    assert cache.pages_free == cache.pages_total == 8


def test_clearing_while_a_sequence_runs_leaves_it_its_pages():
    cache = KVCache(8, 4, prefix_cache=True)
    one = sequence(list(range(8)))
    assert cache.admit(one, 8)
    cache.publish(one, 8)
    cache.clear()
    assert (cache.pages_cached, cache.pages_leased) == (0, 2)
    one.tokens += range(8, 12)
    assert cache.reserve(one, 12) is not None
    cache.publish(one, 12)
    assert cache.pages_cached == 3
    cache.release(one)
    cache.check_idle()


# ----------------------------------------------------------------------------------------------------------------- misuse
def test_misuse_is_an_integrity_error():
    cache = KVCache(8, 4, prefix_cache=True)
    one = sequence(list(range(12)), "r1")
    with pytest.raises(IntegrityError, match="r1 is not admitted"):
        cache.reserve(one, 4)
    with pytest.raises(IntegrityError, match="r1 is not admitted"):
        cache.publish(one, 4)
    assert cache.admit(one, 4)
    with pytest.raises(IntegrityError, match="r1 is admitted already"):
        cache.admit(one, 4)
    with pytest.raises(IntegrityError, match="has written 3 pages and holds 1"):
        cache.publish(one, 12)
    one.pages.append(8)
    with pytest.raises(IntegrityError, match="other pages"):
        cache.check()


def test_idle_with_a_request_left_names_it_and_the_numbers():
    cache = KVCache(8, 4, prefix_cache=True)
    assert cache.admit(sequence([1, 2, 3], "forgotten"), 3)
    with pytest.raises(IntegrityError, match=r"of 8 pages 7 are free, 0 cached, 1 leased, 0 quarantined.*forgotten"):
        cache.check_idle()


def test_idle_with_a_page_in_quarantine_says_so():
    cache = KVCache(8, 4, prefix_cache=True)
    writer = cache.allocator.lease("remote", "handoff 3")
    cache.allocator.allocate(writer, 2)
    cache.allocator.quarantine(writer)
    with pytest.raises(IntegrityError, match=r"2 quarantined.*handoff 3"):
        cache.check_idle()
    cache.allocator.drained(writer)
    cache.check_idle()


# -------------------------------------------------------------------------------------------------------- against a model
WHICH = st.integers(0, 99)


class Cache(RuleBasedStateMachine):
    """Random lives of sequences. `pool` is the device: page → the whole prefix whose KV was last written there."""

    PAGES, SIZE = 16, 2

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(self.PAGES, self.SIZE, prefix_cache=True)
        self.pool: dict[int, tuple[int, ...]] = {}
        self.running: dict[Sequence, int] = {}
        """Sequence → tokens written."""
        self.preempted: list[Sequence] = []

    def pick(self, which: int) -> Sequence | None:
        return list(self.running)[which % len(self.running)] if self.running else None

    def admit(self, one: Sequence, first: int) -> bool:
        known = dump(self.cache._tree)
        length = len(one.tokens)
        hit = []
        if one.request.params.prompt_logprobs is None:
            for prefix in prefixes(one.tokens[: length - 1], self.SIZE):
                if prefix not in known:
                    break
                hit.append(known[prefix])
        leased = {page for other in self.running for page in other.pages}
        new = -(-min(len(hit) * self.SIZE + first, length) // self.SIZE) - len(hit)
        room = self.PAGES - len(leased | set(hit))
        admitted = self.cache.admit(one, first)
        assert admitted == (new <= room)
        if admitted:
            assert one.pages[: len(hit)] == hit
            assert len(one.pages) == len(hit) + new
            assert leased.isdisjoint(one.pages[len(hit) :])
            assert one.prefilled == len(hit) * self.SIZE
            for page, prefix in zip(hit, prefixes(one.tokens, self.SIZE), strict=False):
                assert self.pool[page] == prefix
            self.running[one] = one.prefilled
        else:
            assert dump(self.cache._tree) == known
        return admitted

    @rule(
        after=st.none() | WHICH,
        tokens=st.lists(st.integers(1, 2), min_size=1, max_size=10),
        first=st.integers(1, 16),
        logprobs=st.sampled_from([None, None, None, 0]),
    )
    def arrive(self, after: int | None, tokens: list[int], first: int, logprobs: int | None) -> None:
        known = sorted(dump(self.cache._tree))
        if known and after is not None:
            tokens = [*known[after % len(known)], *tokens[:5]]
        self.admit(sequence(tokens, prompt_logprobs=logprobs), first)

    @rule(first=st.integers(1, 16))
    def come_back(self, first: int) -> None:
        if self.preempted and self.admit(self.preempted[-1], first):
            self.preempted.pop()

    @rule(which=WHICH, more=st.integers(0, 6))
    def reserve(self, which: int, more: int) -> None:
        one = self.pick(which)
        if one is None:
            return
        leased = {page for other in self.running for page in other.pages}
        tokens, before = len(one.tokens) + more, list(one.pages)
        needed = -(-tokens // self.SIZE) - len(before)
        got = self.cache.reserve(one, tokens)
        assert (got is None) == (needed > self.PAGES - len(leased))
        assert one.pages == before + (got or [])
        if got is not None:
            assert len(got) == max(0, needed)
            assert leased.isdisjoint(got)

    def write(self, one: Sequence) -> None:
        """The device computes the KV of the history, as far as there are pages for it."""
        written = min(len(one.tokens), len(one.pages) * self.SIZE)
        for index in range(self.running[one] // self.SIZE, -(-written // self.SIZE)):
            self.pool[one.pages[index]] = tuple(one.tokens[: min(written, (index + 1) * self.SIZE)])
        self.running[one] = written

    def publish(self, one: Sequence, written: int) -> None:
        known = dump(self.cache._tree)
        news = written // self.SIZE > one.published
        self.cache.publish(one, written)
        own = zip(prefixes(one.tokens[:written], self.SIZE), one.pages, strict=False)
        expected = known | {prefix: page for prefix, page in own if prefix not in known} if news else known
        assert dump(self.cache._tree) == expected

    @rule(which=WHICH, tokens=st.lists(st.integers(1, 2), max_size=4), behind=st.integers(0, 3))
    def step(self, which: int, tokens: list[int], behind: int) -> None:
        """Compute, publish what has been collected (`behind` tokens less), draw new tokens."""
        one = self.pick(which)
        if one is not None:
            self.write(one)
            self.publish(one, max(0, self.running[one] - behind))
            one.tokens += tokens

    @rule(tokens=st.lists(st.integers(1, 2), min_size=3, max_size=7), count=st.integers(2, 3), tail=st.integers(1, 2))
    def arrive_together(self, tokens: list[int], count: int, tail: int) -> None:
        """The same prompt several times at once: each computes it in pages of its own, then they differ."""
        twins = [one for one in (sequence(tokens) for _ in range(count)) if self.admit(one, len(tokens))]
        for index, one in enumerate(twins):
            self.write(one)
            self.publish(one, len(one.tokens))
            one.tokens += [tail + index] * 3
            if self.cache.reserve(one, len(one.tokens)) is not None:
                self.write(one)
                self.publish(one, len(one.tokens))

    @rule(which=WHICH, again=st.booleans())
    def leave(self, which: int, again: bool) -> None:
        one = self.pick(which)
        if one is not None:
            del self.running[one]
            self.cache.release(one)
            assert one.pages == []
            if again:
                self.preempted.append(one)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.pages_cached == 0

    @invariant()
    def consistent(self) -> None:
        cache = self.cache
        cache.check()
        known = dump(cache._tree)
        leased = {page for one in self.running for page in one.pages}
        assert cache.pages_leased == len(leased)
        assert cache.pages_cached == len(known) == len(set(known.values()))
        assert cache.pages_free == self.PAGES - len(leased | set(known.values()))
        assert cache.pages_available == self.PAGES - len(leased)
        # Whatever the tree offers is there, in pages that nobody has written over.
        for prefix, page in known.items():
            assert self.pool[page] == prefix
        for one, written in self.running.items():
            for prefix, page in zip(prefixes(one.tokens[:written], self.SIZE), one.pages, strict=False):
                assert self.pool[page] == prefix
        if not self.running:
            cache.check_idle()

    def teardown(self) -> None:
        for one in list(self.running):
            self.cache.release(one)
        self.cache.check_idle()
        self.cache.clear()
        self.cache.check_idle()
        assert self.cache.pages_free == self.PAGES


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_life_at_random(seed: int):
    """The same machine, longer than hypothesis runs it: some interleavings take many sequences to come about."""
    dice = random.Random(seed)
    machine = Cache()

    def tokens(least: int, most: int) -> list[int]:
        return [dice.randint(1, 2) for _ in range(dice.randint(least, most))]

    for _ in range(2500):
        which = dice.randrange(100)
        verb = dice.choices(["step", "arrive", "leave", "reserve", "back", "together", "clear"], [40, 15, 16, 12, 4, 4, 0.2])[0]
        if verb == "step":
            machine.step(which, tokens(0, 4), dice.randrange(3))
        elif verb == "arrive":
            machine.arrive(dice.choice([None, which]), tokens(1, 8), dice.randint(1, 16), None)
        elif verb == "leave":
            machine.leave(which, dice.random() < 0.4)
        elif verb == "reserve":
            machine.reserve(which, dice.randrange(7))
        elif verb == "back":
            machine.come_back(dice.randint(1, 16))
        elif verb == "together":
            machine.arrive_together(tokens(3, 7), 2, 1)
        else:
            machine.clear()
        machine.consistent()
    machine.teardown()
