"""The choice of K from times and acceptance that are made up."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from drafting import Cost, World

from fluentllm.core.buckets import bucket_of
from fluentllm.core.draft_length import DraftLength
from fluentllm.core.draft_watchdog import AcceptanceWatch
from fluentllm.core.types import Drafting, PrefillChunk, SamplingParams, SlotInit, SlotResult, StepPlan, StepResult


def rows(first: float, more: float, draft: float) -> Cost:
    """A step takes `first`, `more` for each draft that it verifies, and `draft` for each that it leaves."""
    return lambda batch, verify, leave: first + more * verify + draft * leave


def world(cost: Cost, batch: int, acceptance: float, **more: float) -> World:
    return World(cost, batch, acceptance, rng=random.Random(7), **more)  # type: ignore[arg-type]


def test_it_finds_the_k_with_the_most_tokens_a_second() -> None:
    for acceptance, best in ((0.0, 0), (0.3, 1), (0.6, 2), (1.0, 4)):
        seen = world(rows(0.010, 0.001, 0.001), 8, acceptance)
        assert max(range(5), key=seen.fixed) == best
        chosen = seen.run(DraftLength("auto", 4), 400).chosen
        assert chosen[200:].count(best) > 0.9 * 200, (acceptance, chosen)


def test_drafts_that_cost_more_than_they_bring_are_left() -> None:
    lengths = DraftLength("auto", 3)
    seen = world(rows(0.010, 0.010, 0.001), 4, 0.8).run(lengths, 2000)
    assert seen.chosen[:40].count(0) > 30
    assert seen.chosen.count(0) > 0.98 * 2000
    assert lengths.times.known(4, 1, 1), "it was tried"


def test_nothing_is_verified_before_a_look_says_that_it_is_right() -> None:
    seen = world(rows(0.010, 0.001, 0.001), 1, 0.0).run(DraftLength("auto", 3), 1000)
    assert set(seen.chosen) == {0}
    assert 30 < seen.looks < 100, "a look takes a tenth of a step, and a two hundredth of the time goes there"
    free = world(rows(0.010, 0.001, 0.0), 1, 0.0).run(DraftLength("auto", 3), 1000)
    assert free.looks > 800, "what costs nothing is looked at almost always"


def test_what_is_right_is_used_soon() -> None:
    seen = world(rows(0.010, 0.002, 0.0), 1, 1.0, eager=True).run(DraftLength("auto", 3, eager=True), 60)
    assert seen.chosen[25:].count(3) > 30
    again = DraftLength("auto", 3, eager=True)
    world(rows(0.010, 0.002, 0.0), 1, 1.0, eager=True).run(again, 60)
    # A new request: times are known, and acceptance by hearsay.
    seen = world(rows(0.010, 0.002, 0.0), 1, 1.0, eager=True).run(again, 10)
    assert seen.chosen.count(0) <= 2


def test_steps_that_change_k_are_programs_of_their_own() -> None:
    """What a change runs costs a second here: nothing else may seem to."""
    lengths = DraftLength("auto", 2)
    world(lambda batch, verify, leave: 0.01 + (verify != leave), 4, 1.0).run(lengths, 200)
    known = [lengths.times.known(4, k, k) for k in range(3)]
    assert all(seconds in (None, 0.01) for seconds in known)
    assert known[0] == 0.01


def test_a_fixed_k_stays() -> None:
    assert set(world(rows(1.0, 1.0, 0.0), 4, 0.0).run(DraftLength(3, 5), 50).chosen) == {3}


def test_without_a_time_to_go_by_nothing_is_drafted() -> None:
    """Every step has a prompt with it: none tells what its decodes take."""
    lengths = DraftLength("auto", 3)
    for step in range(100):
        assert lengths.choose(2) == (0, False)
        plan = StepPlan(step=step, decode=[0, 1], prefill=[PrefillChunk(2, 0, 8, False)], drafting=Drafting())
        lengths.planned(plan)
        slots = [SlotResult(slot, 1, [1], None) for slot in (0, 1)]
        lengths.collected(plan, StepResult(step=step, slots=slots, seconds=0.01))


def test_classes_of_requests_are_told_apart() -> None:
    """Greedy requests accept all drafts, sampled ones none: K follows who runs."""
    lengths, cost = DraftLength("auto", 3), rows(0.010, 0.004, 0.004)
    for turn in range(8):
        sampled = turn % 2
        seen = World(cost, 4, 1.0 - sampled, sampled=bool(sampled), rng=random.Random(turn)).run(lengths, 100)
        if turn > 1:
            later = seen.chosen[20:]
            assert later.count(0 if sampled else 3) > 0.85 * len(later), (turn, later)


@pytest.mark.parametrize("acceptance", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("offered", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("more", [3.0, 6.0])
def test_steps_that_verify_in_vain_say_nothing_of_the_others(more: float, offered: float, acceptance: float) -> None:
    """One sequence on a GPU, of a model with experts: where a lookup finds nothing a step takes as long as without drafts."""
    for seed in range(3):
        seen = World(rows(10.0, more, 0.0), 1, acceptance, offered, experts=True, noise=True, rng=random.Random(seed))
        seen.run(DraftLength("auto", 3), 3000)
        assert seen.rate() > 0.98 * seen.fixed(0)
        assert seen.rate() > 0.88 * max(seen.fixed(k) for k in range(4))


def test_acceptance_that_comes_back_is_noticed() -> None:
    lengths, cost = DraftLength("auto", 3), rows(0.010, 0.002, 0.002)
    seen = world(cost, 1, 0.0).run(lengths, 2000)
    assert set(seen.chosen) == {0}
    seen.acceptance, seen.chosen = 1.0, []
    seen.run(lengths, 1000)
    assert seen.chosen[300:].count(3) > 0.9 * 700, "others, nearly as good, are tried too"
    seen.acceptance, seen.chosen = 0.0, []
    seen.run(lengths, 400)
    assert seen.chosen[100:].count(0) > 0.97 * 300


@pytest.mark.parametrize("tokens", [32, 64, 256])
def test_short_requests_one_after_the_other(tokens: int) -> None:
    """One stream with prompt lookup: some answers repeat the prompt, the others find a place now and then that is wrong. What
    is learnt of one request is little for the next, and no kind may suffer by the other."""
    spent, plain, best = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, 0.0
    lengths, rng = DraftLength("auto", 3, eager=True), random.Random(tokens)
    for number in range(24):
        repeats = number % 4 > 1
        offered, right = (0.9, 0.85) if repeats else (0.3, 0.1)
        seen = World(rows(0.008, 0.0012, 0.00005), 1, right, offered, eager=True, noise=True, rng=rng)
        seen.until(lengths, tokens)
        if number > 3:
            spent[repeats] += seen.time / seen.tokens
            plain[repeats] += 1 / seen.fixed(0)
            best += 1 / seen.fixed(3) if repeats else 0.0
    assert spent[False] < (1.02 + 2 / tokens) * plain[False], "no more than two steps of a request"
    assert spent[True] < (1.05 + 8 / tokens) * best, "eight more until it is sure"
    assert spent[True] < 0.75 * plain[True]


def test_a_k_that_cannot_be_afforded_was_not_tried() -> None:
    """A look says that drafts are right, but a trial is dearer than what has been saved: no K has had its turn."""
    lengths, cost = DraftLength("auto", 2), rows(0.010, 0.001, 0.001)
    seen = world(cost, 1, 1.0).run(lengths, 3)
    while not lengths.acceptance.tokens({}, 1) > 1.0:
        seen.run(lengths, 1)
    lengths._for_trials.spend(1.0)
    before = dict(lengths._tried)
    seen.chosen = []
    seen.run(lengths, 50)
    assert set(seen.chosen) == {0}
    assert lengths._tried == before


def test_a_time_that_another_program_made_long_is_measured_again() -> None:
    """While K = 1 is tried the machine does something else, and verifying seems ten times as long."""
    load = {"verify": 0.100}

    def cost(batch: int, verify: int, leave: int) -> float:
        return 0.010 + 0.001 * leave + (load["verify"] if verify else 0.0)

    lengths = DraftLength("auto", 2, eager=True)
    seen = world(cost, 1, 1.0, eager=True).run(lengths, 300)
    assert lengths.times.known(1, 1, 1) == pytest.approx(0.111)
    assert set(seen.chosen[-100:]) == {0}
    load["verify"], seen.chosen = 0.001, []
    seen.run(lengths, 5000)
    assert seen.chosen[-500:].count(2) > 450, "once in so many steps what was much worse is tried too"


@pytest.mark.parametrize("seed", range(4))
def test_a_change_of_what_is_asked(seed: int) -> None:
    """One stream, 64 tokens a request: a draft layer that is bad at seven requests and good at the next seven; prompt lookup on
    seven that repeat the prompt, then seven chats. From the very first step on, what does not pay costs less than 3 %."""
    rng, ran = random.Random(seed), Counter[tuple[int, int]]()

    def requests(lengths: DraftLength, cost: Cost, right: float, offered: float, k: int) -> float:
        """How fast, beside a fixed K."""
        speeds = []
        for _ in range(7):
            seen = World(cost, 1, right, offered, eager=True, noise=True, rng=rng, ran=ran).until(lengths, 64)
            speeds.append(seen.rate() / seen.fixed(k))
        return len(speeds) / sum(1 / speed for speed in speeds)

    layer, lookup = rows(7.5, 1.25, 0.7), rows(7.8, 1.25, 0.0)
    lengths = DraftLength("auto", 4, eager=True)
    assert requests(lengths, layer, 0.14, 1.0, 0) > 0.97
    assert requests(lengths, layer, 0.45, 1.0, 1) > 0.85, "it must look first, and a look takes a tenth of a step"
    lengths, ran = DraftLength("auto", 4, eager=True), Counter()
    assert requests(lengths, lookup, 0.85, 0.75, 3) > 0.9
    assert requests(lengths, lookup, 0.2, 0.3, 0) > 0.97


@pytest.mark.parametrize("load", [1.0, 1.1])
def test_chats_after_answers_that_repeat(load: float) -> None:
    """SmolLM2 with prompt lookup on two cores, 64 tokens a request: ten answers repeat the prompt, then ten chats have a draft
    in five steps, and none is right. The plain step was measured in the first of the answers, when all took `load` as long."""
    by_rows, seeds = (6.6, 7.15, 7.9, 9.0, 9.5), 8
    repeated, chats = 0.0, [0.0] * 10
    for seed in range(seeds):
        lengths, rng, ran = DraftLength("auto", 4, eager=True), random.Random(seed), Counter[tuple[int, int]]()
        for number in range(20):
            factor, right, offered = (load, 0.85, 0.75) if number < 10 else (1.0, 0.0, 0.2)
            cost: Cost = lambda _, verify, leave, f=factor: f * (by_rows[verify] + 0.03 * (leave > 0))  # noqa: E731
            seen = World(cost, 1, right, offered, eager=True, noise=True, rng=rng, ran=ran).until(lengths, 64)
            took = seen.fixed(0) / seen.rate() / seeds
            if number < 10:
                repeated += took / 10
            else:
                chats[number - 10] += took
    assert repeated < 0.5
    assert sum(chats[:7]) / 7 < 1.03, "what is usual of requests is forgotten as soon as there are others"
    assert max(chats[5:]) < 1.02, "and then nothing is verified in vain"


def test_buckets() -> None:
    """What is measured is what is captured."""
    buckets = [bucket_of(batch) for batch in range(1, 257)]
    assert buckets[:10] == [1, 2, 4, 4, 8, 8, 8, 8, 10, 10]
    assert all(0 <= bucket - batch < max(bucket / 5, 3.1) for batch, bucket in enumerate(buckets, 1))
    assert all(bucket_of(bucket) == bucket for bucket in buckets)
    assert len(set(buckets)) == 24


# ------------------------------------------------------------------------------------------------------------ in the long run
def memory_bound(batch: int, rows: int) -> float:
    """A few experts more for each row, then arithmetic."""
    return 3.0 + 9.0 * (1 - 0.97 ** (batch * rows)) + max(0.0, 0.02 * (batch * rows - 200))


def compute_bound(batch: int, rows: int) -> float:
    """A CPU: every row costs."""
    return 8.0 + 1.6 * batch * rows


def in_tiles(batch: int, rows: int) -> float:
    """Rows are computed in tiles of 64: one more may cost a lot, or nothing."""
    return 4.0 + 2.0 * -(-batch * rows // 64)


Pass = Callable[[int, int], float]
PASSES = [memory_bound, compute_bound, in_tiles]
KINDS = ["draft layer", "prompt lookup"]
MAX_K = 3
SHORT, LONG = 512, 3000
"""Steps from the very first on, in which all that is learnt must pay."""


def world_of(cost: Pass, kind: str, batch: int, acceptance: float, rng: random.Random) -> World:
    """A draft layer takes a tenth of a pass a draft, and its programs are captured. Prompt lookup takes next to nothing, has
    drafts for two sequences in five, and its programs are eager."""
    lookup = kind == "prompt lookup"

    def seconds(sequences: int, verify: int, leave: int) -> float:
        drafting = 0.005 * (leave > 0) if lookup else 0.1 * leave
        return cost(sequences, verify + 1) + drafting * cost(sequences, 1)

    return World(seconds, batch, acceptance, 0.4 if lookup else 1.0, eager=lookup, noise=True, rng=rng)


def long_run(cost: Pass, kind: str, batch: int, acceptance: float, steps: int) -> tuple[float, list[float]]:
    """Tokens a second → of `auto`, all that it tries included, and of every fixed K."""
    rng = random.Random(f"{cost.__name__} {kind} {batch} {acceptance}")
    seen = world_of(cost, kind, batch, acceptance, rng)
    found = seen.run(DraftLength("auto", MAX_K, eager=kind == "prompt lookup"), steps).rate()
    return found, [seen.fixed(k) for k in range(MAX_K + 1)]


def check(cost: Pass, kind: str, batch: int, acceptance: float) -> None:
    """With all that it tries: at most 2 % slower than no drafts, and in the long run within 5 % of the best fixed K."""
    found, fixed = long_run(cost, kind, batch, acceptance, SHORT)
    assert found > 0.98 * fixed[0], (SHORT, acceptance, found, fixed)
    found, fixed = long_run(cost, kind, batch, acceptance, LONG)
    assert found > 0.98 * fixed[0], (LONG, acceptance, found, fixed)
    assert found > 0.95 * max(fixed), (LONG, acceptance, found, fixed)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", PASSES)
def test_never_slower_in_the_long_run(cost: Pass, kind: str, batch: int) -> None:
    for acceptance in (0.0, 0.4, 0.8):
        check(cost, kind, batch, acceptance)


@pytest.mark.parametrize(
    ("cost", "kind", "acceptance", "before", "after"),
    [
        (compute_bound, "draft layer", 0.6, 1, 33),
        (in_tiles, "prompt lookup", 0.4, 8, 200),
        (compute_bound, "prompt lookup", 0.6, 200, 4),
    ],
)
def test_a_batch_where_drafts_no_longer_pay(cost: Pass, kind: str, acceptance: float, before: int, after: int) -> None:
    """They paid at another, or what was saved there was many steps' time here: it costs little to notice."""
    lengths, rng = DraftLength("auto", MAX_K, eager=kind == "prompt lookup"), random.Random(1)
    world_of(cost, kind, before, acceptance, rng).run(lengths, 600)
    seen = world_of(cost, kind, after, acceptance, rng).run(lengths, SHORT)
    assert seen.rate() > 0.96 * seen.fixed(0)


@pytest.mark.parametrize("kind", KINDS)
def test_never_slower_with_many(kind: str) -> None:
    found, fixed = long_run(compute_bound, kind, 256, 0.9, SHORT)
    assert found > 0.98 * fixed[0]


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 33, 64, 100, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", PASSES)
def test_never_slower_at_any_acceptance(cost: Pass, kind: str, batch: int) -> None:
    for acceptance in range(11):
        check(cost, kind, batch, acceptance / 10)


def prompts_alone(lengths: DraftLength, step: int, slot: int, running: int, *, new: bool = True, last: bool = True) -> None:
    """A step in which one prompt is computed, and nobody decodes (`scheduler.prefill_first`)."""
    k, look = lengths.choose(running)
    params = SamplingParams(max_tokens=9, temperature=0.0)
    admit = [SlotInit(slot, step, [1], 1, 0, [], params, [])] if new else []
    drafting = Drafting(k, k + look, look)
    plan = StepPlan(step=step, admit=admit, prefill=[PrefillChunk(slot, 0, 9, last)], drafting=drafting)
    lengths.planned(plan)
    slots = [SlotResult(slot, step, [1], None, drafts=[1] * (k + look) if look else [])] if last else []
    lengths.collected(plan, StepResult(step=step, slots=slots, seconds=1.0, verified=k))


@pytest.mark.parametrize("last", [False, True])
def test_a_newcomer_does_not_make_forget_those_who_wait_for_it(last: bool) -> None:
    lengths = DraftLength("auto", 3)
    world(rows(0.010, 0.001, 0.001), 32, 0.3).run(lengths, 300)
    world(rows(0.010, 0.001, 0.001), 32, 0.9).run(lengths, 300)  # others, of whom much was seen since
    known = {(True, False): 0, (False, False): 1}
    share = lengths.acceptance._of((False, False)).right[0]
    mean, weight = share.mean, share.weight
    prompts_alone(lengths, 1000, 40, 32, last=last)
    assert share.mean == pytest.approx(mean, abs=0.05), "all but one of those who run are as they were"
    assert share.weight > 0.9 * weight
    assert lengths.acceptance.tokens(known, 3) > 3


def test_steps_over_prompts_alone_are_no_part_of_a_trial() -> None:
    lengths = DraftLength("auto", 3)
    seen = world(rows(0.010, 0.001, 0.001), 2, 0.9)
    while lengths._trial is None:
        seen.run(lengths, 1)
        lengths.choose(2)
    trial, steps, left = lengths._trial, dict(lengths._steps), set(lengths._left)
    for step in range(1000, 1020):
        prompts_alone(lengths, step, 5, 2)
    assert lengths._trial == trial, "it has not begun"
    assert lengths._steps == steps, "no step of any bucket"
    assert not lengths._trials.difference(range(1000)), "nothing is kept of them"
    assert lengths._left == left | ({5} if trial.k else set())


def test_a_look_outlasts_steps_over_prompts_alone() -> None:
    """What was left in a slot is still there when it decodes again."""
    acceptances = []
    for between in (False, True):
        lengths = DraftLength("auto", 3, eager=True)
        seen = world(rows(0.010, 0.020, 0.0), 1, 0.8, eager=True)  # no draft pays, and a look costs nothing
        for step in range(200):
            seen.run(lengths, 1)
            if between:
                prompts_alone(lengths, 1000 + step, 7, 1, new=False, last=False)
        share = lengths.acceptance._of((False, False)).right[0]
        acceptances.append((share.mean, share.weight))
    assert acceptances[1] == pytest.approx(acceptances[0], rel=0.2)


@pytest.mark.parametrize(("draft", "steps"), [(0.0, 700), (0.001, 10_400)])
def test_drafts_that_are_always_wrong_are_told_though_none_is_verified(draft: float, steps: int) -> None:
    """What is looked at counts. The pause holds for looks too, and right drafts are found behind it."""
    watch = AcceptanceWatch(0.02, "proposer 'x'")
    lengths = DraftLength("auto", 3, watch)
    seen = world(rows(0.010, 0.001, draft), 1, 0.0).run(lengths, steps)
    assert set(seen.chosen) == {0}
    assert watch.collapsed
    assert watch.collapses == 1
    looked = seen.looks
    seen.run(lengths, 200)
    assert seen.looks == looked
    seen.acceptance, seen.chosen = 1.0, []
    seen.run(lengths, 5000)
    assert not watch.collapsed
    assert watch.collapses == 1
    assert seen.chosen[-500:].count(3) > 450


def test_drafts_that_are_right_at_times_do_not_collapse() -> None:
    watch = AcceptanceWatch(0.02)
    seen = world(rows(0.010, 0.010, 0.0), 1, 0.1).run(DraftLength("auto", 3, watch), 5000)
    assert seen.looks > 4000
    assert watch.collapses == 0
