"""What is committed of drawn tokens: accepted drafts, stop ids, budgets, finished slots."""

from __future__ import annotations

import torch

from fluentllm.core.slots import SlotTables
from fluentllm.core.types import SamplingParams, SlotInit
from fluentllm.step.commit import OUT_OF_BUDGET, RUNNING, STOPPED, commit, leave_drafts


def tables_with(budgets: list[int], stops: list[list[int]]) -> SlotTables:
    """Slot i has history [100, 101], a budget and stop ids."""
    tables = SlotTables(len(budgets), 32, 8, 200, torch.device("cpu"), max_drafts=4)
    for slot, (budget, ids) in enumerate(zip(budgets, stops, strict=True)):
        tables.admit(SlotInit(slot, 1, [100, 101], 2, 0, [1], SamplingParams(max_tokens=budget), ids), 0)
    return tables


def test_one_token_a_slot_without_drafts() -> None:
    tables = tables_with([5, 1, 5], [[], [], [9]])
    none = torch.empty(3, 0, dtype=torch.int64)
    got = commit(torch.tensor([[7], [8], [9]]), none, torch.arange(3), tables, 0)
    assert got.counts.tolist() == [1, 1, 1]
    assert got.states.tolist() == [RUNNING, OUT_OF_BUDGET, STOPPED]
    assert tables.length[:3].tolist() == [3, 3, 3]
    assert tables.history[:3, 2].tolist() == [7, 8, 9]
    assert tables.finished[:3].tolist() == [False, True, True]
    again = commit(torch.tensor([[7], [8], [9]]), none, torch.arange(3), tables, 0)
    assert again.counts.tolist() == [1, 0, 0], "a finished slot is inert"
    assert tables.length[:3].tolist() == [4, 3, 3]


def test_drafts_are_accepted_up_to_the_first_that_differs() -> None:
    tables = tables_with([9] * 4, [[]] * 4)
    drawn = torch.tensor([[1, 2, 3]] * 4)
    drafts = torch.tensor([[1, 2], [1, 5], [5, 2], [5, 5]])
    leave_drafts(drafts, torch.full((4,), 2), torch.arange(4), tables)
    assert tables.history[1, 2:4].tolist() == [1, 5]
    got = commit(drawn, drafts, torch.arange(4), tables, 0)
    assert got.drafted.tolist() == [2, 2, 2, 2]
    assert got.counts.tolist() == [3, 2, 1, 1]
    assert got.accepted.tolist() == [2, 1, 0, 0]
    assert tables.history[0, 2:5].tolist() == [1, 2, 3]
    assert tables.length[:4].tolist() == [5, 4, 3, 3]


def test_a_stop_id_or_the_budget_inside_accepted_drafts_ends_there() -> None:
    tables = tables_with([9, 2, 2], [[2], [], [2]])
    drawn = torch.tensor([[1, 2, 3]] * 3)
    leave_drafts(drawn[:, :2], torch.full((3,), 2), torch.arange(3), tables)
    got = commit(drawn, drawn[:, :2].clone(), torch.arange(3), tables, 0)
    assert got.counts.tolist() == [2, 2, 2]
    assert got.states.tolist() == [STOPPED, OUT_OF_BUDGET, STOPPED]
    assert tables.length[:3].tolist() == [4, 4, 4]


def test_only_as_many_drafts_count_as_were_left() -> None:
    tables = tables_with([9] * 3, [[]] * 3)
    drawn = torch.tensor([[1, 2, 3]] * 3)
    leave_drafts(drawn[:, :2], torch.tensor([0, 1, 2]), torch.arange(3), tables)
    got = commit(drawn, drawn[:, :2].clone(), torch.arange(3), tables, 0)
    assert got.counts.tolist() == [1, 2, 3]
    assert (got.drafted.tolist(), got.accepted.tolist()) == ([0, 1, 2], [0, 1, 2])
    again = commit(drawn, drawn[:, :2].clone(), torch.arange(3), tables, 0)
    assert again.counts.tolist() == [1, 1, 1], "drafts are good for one step"


def test_no_slots() -> None:
    tables = tables_with([1], [[]])
    got = commit(
        torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), tables, 0
    )
    assert got.counts.shape == (0,)
