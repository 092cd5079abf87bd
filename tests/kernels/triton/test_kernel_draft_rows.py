"""Rows of a draft layer against the step program's own, on slot tables that a step has just changed."""

from __future__ import annotations

import pytest
import torch
from test_kernel_step import VOCAB, move, random_tables

from fluentllm.core.slots import SlotTables
from fluentllm.kernels.triton.draft_rows import next_rows, shift_rows
from fluentllm.step.commit import commit_reference
from fluentllm.step.decode import decode_batch_reference
from fluentllm.step.draft_rows import next_rows_reference, shifted_reference

SLOTS, PAGE = 12, 16


def own_pages(tables: SlotTables, rng: torch.Generator) -> int:
    """Every slot has pages of its own; those of the padding slot are the scratch page → how many there are."""
    pages = torch.randperm(SLOTS * tables.max_pages, generator=rng) + 1
    tables.page_table[:-1] = pages.view(SLOTS, -1).to(tables.device, torch.int32)
    tables.page_table[-1] = 0
    return SLOTS * tables.max_pages


def some_slots(count: int, rng: torch.Generator) -> torch.Tensor:
    """Some of the slots in any order, behind them the padding slot thrice."""
    return torch.tensor([*torch.randperm(SLOTS, generator=rng)[:count].tolist(), SLOTS, SLOTS, SLOTS])


@pytest.mark.parametrize("width", [40, 1500])
@pytest.mark.parametrize("drafts", range(6))
def test_rows_behind_a_pass(drafts: int, width: int, device: torch.device, rng: torch.Generator) -> None:
    """Slots that had finished before, that finish now, that got one token or more; ends of pages among them."""
    plain = random_tables(SLOTS, drafts, rng, torch.device("cpu"))
    pages, rows = own_pages(plain, rng), drafts + 1
    near = torch.rand(SLOTS, generator=rng) < 0.5
    plain.length[:-1] = torch.where(near, plain.length[:-1] // PAGE * PAGE + 15, plain.length[:-1])
    plain.end[:-1] = plain.length[:-1] + torch.randint(1, 6, (SLOTS,), generator=rng)
    slots = some_slots(9, rng)
    batch = decode_batch_reference(slots, drafts, plain)
    drawn = torch.randint(0, VOCAB, (len(slots), rows), generator=rng)
    tokens = batch.tokens.view(-1, rows)[:, 1:]
    equal = torch.rand(tokens.shape, generator=rng) < 0.7
    commit_reference(drawn, tokens, slots, plain, 0, equal)

    ours = move(plain, device)
    states = torch.randn(len(slots) * rows, width, generator=rng).to(torch.bfloat16)
    kept = torch.randn(pages + 1, width, generator=rng).to(torch.bfloat16)
    known = kept.to(device, copy=True)
    found = shift_rows(
        batch.positions.to(device), batch.kv_rows.to(device), batch.kv_lengths.to(device), batch.page_table.to(device),
        slots.to(device), rows, ours.length, ours.history, PAGE, states.to(device), known,
    )  # fmt: skip
    scratch = kept[0].clone()
    expected, newest = shifted_reference(batch, plain, states, kept)
    for name in ("tokens", "positions", "kv_rows", "kv_lengths"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert torch.equal(found.newest.cpu(), newest)
    assert torch.equal(known.cpu()[1:], kept[1:])
    assert torch.equal(known.cpu()[0], scratch)


def test_no_rows(device: torch.device, rng: torch.Generator) -> None:
    tables, none = random_tables(SLOTS, 0, rng, device), torch.empty(0, dtype=torch.int64, device=device)
    lengths, table = none.to(torch.int32), tables.page_table[:0]
    states, kept = torch.zeros(0, 40, device=device), torch.zeros(9, 40, device=device)
    found = shift_rows(none, none, lengths, table, none, 1, tables.length, tables.history, PAGE, states, kept)
    assert [len(rows) for rows in (found.tokens, found.positions, found.kv_rows, found.kv_lengths, found.newest)] == [0] * 5


@pytest.mark.parametrize("count", range(1, 6))
def test_rows_of_the_drafts_that_follow(count: int, device: torch.device, rng: torch.Generator) -> None:
    plain = random_tables(SLOTS, 5, rng, torch.device("cpu"))
    own_pages(plain, rng)
    ours, slots = move(plain, device), some_slots(7, rng)
    found = next_rows(slots.to(device), count, ours.length, ours.finished, ours.page_table, PAGE)
    batch = decode_batch_reference(slots, 0, plain)
    expected = next_rows_reference(slots, count, batch.page_table, plain, batch)
    assert len(expected) == count
    for i, rows in enumerate(expected):
        for name in ("positions", "kv_rows", "kv_lengths"):
            assert torch.equal(getattr(found, name)[i].cpu(), getattr(rows, name)), name
        assert torch.equal(found.sequences.cpu(), rows.sequences)
        assert torch.equal(found.query_start.cpu(), rows.query_start)
