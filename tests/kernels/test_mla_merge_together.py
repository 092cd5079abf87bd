"""A sequence's splits merged by the programs that computed them: in any order of theirs all is merged, by nobody too early."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from mla_splits import decoded

from fluentllm.kernels.mla_decode.plan import new_plan
from fluentllm.kernels.mla_decode.replay import combine_reference, pieces
from fluentllm.kernels.mla_decode.replay_merge import FEW, FEW_ROWS, merge_together, shares_of

LENGTHS = st.lists(st.sampled_from([0, 1, 64, 65, 500, 1500, 3000]), min_size=1, max_size=9)


@settings(max_examples=40)
@given(st.integers(2, 132), st.integers(1, 200))
def test_every_value_has_one_share(splits: int, rows: int) -> None:
    seen = torch.zeros(rows, 512, dtype=torch.int32)
    for group in range(-(-rows // 64)):
        for half in range(2):
            for own in range(splits):
                for share in shares_of(splits, own, rows, group, half):
                    seen[share.rows.start : share.rows.stop, share.columns.start : share.columns.stop] += 1
    assert (seen == 1).all()


def planned(lengths: list[int], parts: int, rows: int, rng: torch.Generator):
    """(plan, partial, lse, out) with counters for programs that merge together."""
    plan = new_plan(torch.tensor(lengths, dtype=torch.int32), parts, cells=-(-rows // 64) * 2)
    out, partial, lse = decoded(plan, rows, rng)
    return plan, partial, lse, out


@settings(max_examples=15, deadline=None)
@given(LENGTHS, st.integers(2, 14), st.sampled_from([3, 16, 70]), st.randoms(use_true_random=False))
def test_programs_in_any_order(lengths: list[int], parts: int, rows: int, order: random.Random) -> None:
    """Several layers of a step, whose counters go on; against the merge of a launch of its own."""
    rng = torch.Generator().manual_seed(order.randrange(1 << 30))
    counters = [0] * (len(lengths) * -(-rows // 64) * 2)
    for _ in range(3):
        plan, partial, lse, out = planned(lengths, parts, rows, rng)
        expected = out.clone()
        combine_reference(plan, expected, partial, lse)
        merge_together(plan, counters, out, (partial, lse), order.randrange)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_program_that_never_comes_is_noticed() -> None:
    """The replay would see programs that wait for each other."""
    plan, partial, lse, out = planned([3000], 6, 3, torch.Generator().manual_seed(1))
    plan.records[2, 3] = plan.records[2, 4]  # its piece is gone
    with pytest.raises((RuntimeError, KeyError)):
        merge_together(plan, [0, 0], out, (partial, lse), lambda n: n - 1)


def test_the_replay_shares_as_the_kernel_does() -> None:
    pytest.importorskip("triton")
    from fluentllm.kernels.mla_decode import hopper_common, hopper_merge, plan

    assert hopper_merge.FEW.value == FEW
    assert hopper_merge.FEW_ROWS.value == FEW_ROWS
    assert hopper_common.RECORD.value == plan.RECORD
    assert hopper_common.PAGES_AT.value == plan.PAGES_AT


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 140))
def test_records_hold_the_first_pages(lengths: list[int], parts: int) -> None:
    table = torch.randperm(len(lengths) * 50).view(len(lengths), 50).to(torch.int32)
    plan = new_plan(torch.tensor(lengths, dtype=torch.int32), parts, page_table=table)
    records = plan.records.tolist()
    firsts = {}
    for piece in pieces(plan):
        firsts.setdefault(piece.part, piece)
    for record in records:
        begin, end, _, first, last = record[:5]
        pages = table[begin, first:last][:8].tolist() if begin < end else []
        assert record[8 : 8 + len(pages)] == pages
        assert not any(record[8 + len(pages) :])
    assert plan.pages == 8
    # What a part reads first is what its record starts with, but where an inert sequence stands in front of it.
    for part, piece in firsts.items():
        if records[part][0] == piece.sequence:
            assert records[part][8] == table[piece.sequence, piece.first]
