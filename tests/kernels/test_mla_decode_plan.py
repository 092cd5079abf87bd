"""The device-side split: every page is read once, evenly, and the combine is told where the pieces are."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from fluentllm.kernels.mla_decode.plan import OVERHEAD, DecodePlan, new_plan
from fluentllm.kernels.mla_decode.replay import pieces

LENGTHS = st.lists(st.sampled_from([0, 1, 63, 64, 65, 500, 4096, 30_000]), min_size=1, max_size=20)


def plan_of(lengths: list[int], parts: int) -> DecodePlan:
    return new_plan(torch.tensor(lengths, dtype=torch.int32), parts)


@settings(max_examples=25)
@given(LENGTHS, st.integers(1, 140))
def test_every_page_is_in_exactly_one_piece(lengths: list[int], parts: int) -> None:
    plan = plan_of(lengths, parts)
    seen = [(piece.sequence, page) for piece in pieces(plan) for page in range(piece.first, piece.last)]
    assert sorted(seen) == [(i, page) for i, keys in enumerate(lengths) for page in range(-(-keys // 64))]


@settings(max_examples=25)
@given(LENGTHS, st.integers(1, 140))
def test_spans_name_the_parts_of_a_sequence_and_slots_are_unique(lengths: list[int], parts: int) -> None:
    plan = plan_of(lengths, parts)
    found = list(pieces(plan))
    for i, (first, last) in enumerate(plan.spans.tolist()):
        assert [piece.part for piece in found if piece.sequence == i] == list(range(first, last + 1))
    split = [piece.slot for piece in found if plan.spans[piece.sequence, 0] != plan.spans[piece.sequence, 1]]
    assert len(set(split)) == len(split)
    assert all(slot < 2 * parts for slot in split)


@settings(max_examples=25)
@given(LENGTHS, st.integers(1, 140))
def test_no_part_has_much_more_than_its_share(lengths: list[int], parts: int) -> None:
    plan = plan_of(lengths, parts)
    loads = [0] * parts
    for piece in pieces(plan):
        loads[piece.part] += piece.last - piece.first
    pages = [-(-keys // 64) for keys in lengths]
    share = -(-sum(count + OVERHEAD * (count > 0) for count in pages) // parts)
    assert max(loads) <= share + OVERHEAD


def test_equal_lengths_are_cut_without_leftovers() -> None:
    plan = plan_of([4096] * 32, 132)
    assert {piece.last - piece.first for piece in pieces(plan)} == {16}
    assert len(list(pieces(plan))) == 128


def test_one_long_sequence_fills_the_chip() -> None:
    assert len(list(pieces(plan_of([100_000], 132)))) > 120
