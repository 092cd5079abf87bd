"""Rows, commit, drafts and prompt lookup against the step program's own, on real slot tables."""

from __future__ import annotations

import copy

import pytest
import torch

from fluentllm.core.slots import SlotTables
from fluentllm.core.types import Feature
from fluentllm.kernels.prompt_lookup import prompt_lookup as plain_lookup
from fluentllm.kernels.triton.commit import commit_tokens, decode_rows, leave_drafts
from fluentllm.kernels.triton.prompt_lookup import prompt_lookup
from fluentllm.kernels.triton.publish import publish
from fluentllm.step.commit import commit_reference as commit, leave_drafts_reference as plain_leave
from fluentllm.step.decode import decode_batch_reference as decode_batch
from fluentllm.step.result_ring import publish_reference

VOCAB = 12


def random_tables(slots: int, drafts: int, rng: torch.Generator, device: torch.device) -> SlotTables:
    """Half-way through random requests over few tokens, so that drafts and stop ids are hit often."""
    tables = SlotTables(slots, 200, 16, VOCAB, torch.device("cpu"), max_drafts=drafts)
    tables.history.copy_(torch.randint(0, VOCAB, tables.history.shape, generator=rng))
    tables.page_table.copy_(torch.randint(1, 99, tables.page_table.shape, generator=rng))
    tables.length[:-1] = torch.randint(1, 190, (slots,), generator=rng)
    tables.end[:-1] = tables.length[:-1] + torch.randint(1, 6, (slots,), generator=rng)
    tables.drafted[:-1] = torch.randint(0, drafts + 1, (slots,), generator=rng)
    tables.stop_ids[:-1, :2] = torch.randint(-1, VOCAB, (slots, 2), generator=rng).int()
    tables.finished[:-1] = torch.rand(slots, generator=rng) < 0.2
    return move(tables, device)


def move(tables: SlotTables, device: torch.device) -> SlotTables:
    moved = copy.copy(tables)
    moved.device = device
    for name in ("history", "page_table", "stop_ids", "ints", "floats", "finished", "output_counts"):
        setattr(moved, name, getattr(tables, name).clone().to(device))
    moved.length, moved.prompt_length, moved.end, moved.min_end, moved.top_k, moved.logprobs, moved.seed, moved.drafted = (
        moved.ints.unbind(1)
    )
    return moved


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
def test_a_step_of_the_tables(drafts: int, told: bool, device: torch.device, rng: torch.Generator) -> None:
    """`told`: which drafts are right is said, not seen."""
    count = 12
    ours = random_tables(count, drafts, rng, device)
    plain = move(ours, torch.device("cpu"))
    # Padding rows share the inert slot.
    order = [*torch.randperm(count, generator=rng)[:9].tolist(), count, count, count]
    slots = torch.tensor(order)

    batch = decode_batch(slots, drafts, plain)
    columns = ours.length, ours.drafted, ours.finished, ours.history, ours.page_table
    rows = decode_rows(slots.to(device), drafts + 1, *columns, 16)
    for name in ("tokens", "positions", "sequences", "query_start", "kv_rows", "kv_lengths", "page_table"):
        assert torch.equal(getattr(rows, name).cpu(), getattr(batch, name)), name

    tokens = batch.tokens.view(-1, drafts + 1)
    # Half of what is drawn is what was drafted.
    drawn = torch.randint(0, VOCAB, tokens.shape, generator=rng)
    drawn[:, :-1] = torch.where(torch.rand(drawn[:, :-1].shape, generator=rng) < 0.7, tokens[:, 1:], drawn[:, :-1])
    equal = torch.rand(drawn[:, :-1].shape, generator=rng) < 0.7 if told else None
    committed = commit(drawn, tokens[:, 1:], slots, plain, Feature.PENALTIES, equal)
    packed = commit_tokens(
        drawn.to(device), rows.tokens.view(-1, drafts + 1)[:, 1:], slots.to(device), ours.length, ours.end, ours.drafted,
        ours.finished, ours.stop_ids, ours.history, ours.output_counts, equal.to(device) if equal is not None else None,
    ).cpu()  # fmt: skip
    assert torch.equal(packed[:, : drafts + 1], committed.tokens)
    columns = (committed.counts, committed.states, committed.drafted, committed.accepted)
    for place, column in enumerate(columns):
        assert torch.equal(packed[:, drafts + 1 + place], column), place
    for name in ("ints", "finished"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(plain, name)), name
    # The plain form writes what it rejects to the padding slot's row.
    for name in ("history", "output_counts"):
        assert torch.equal(getattr(ours, name).cpu()[:-1], getattr(plain, name)[:-1]), name

    if drafts:
        # Ids and counts that cannot be are clamped.
        proposed = torch.randint(-2, VOCAB + 2, (9, drafts), generator=rng)
        valid = torch.randint(-1, drafts + 2, (9,), generator=rng)
        plain_leave(proposed, valid, slots[:9], plain)
        given = proposed.to(device), valid.to(device), slots[:9].to(device)
        leave_drafts(*given, ours.length, ours.drafted, ours.history, VOCAB)
        assert torch.equal(ours.history.cpu()[:-1], plain.history[:-1])
        assert torch.equal(ours.ints.cpu(), plain.ints)


def test_commit_without_counts_leaves_them(device: torch.device, rng: torch.Generator) -> None:
    tables = random_tables(4, 0, rng, device)
    slots = torch.arange(4, device=device)
    drawn = torch.zeros(4, 1, dtype=torch.int64, device=device)
    commit_tokens(
        drawn, drawn, slots, tables.length, tables.end, tables.drafted, tables.finished, tables.stop_ids, tables.history
    )
    assert not tables.output_counts.any()


@pytest.mark.parametrize(("width", "vocab"), [(40, 2), (3000, 3), (9000, 40)])
def test_lookup(width: int, vocab: int, device: torch.device, rng: torch.Generator) -> None:
    history = torch.randint(0, vocab, (6, width), generator=rng, dtype=torch.int32)
    ints = torch.randint(1, width - 8, (6, 8), generator=rng)
    ints[0, 0], ints[1, 0] = 1, 2
    slots = torch.tensor([5, 0, 1, 3])
    expected = plain_lookup(history[slots], ints[slots, 0], 5, 2, 4)
    drafts, valid = prompt_lookup(history.to(device), slots.to(device), ints.to(device)[:, 0], 5, 2, 4)
    assert torch.equal(valid.cpu(), expected[1])
    assert torch.equal(drafts.cpu(), expected[0])


@pytest.mark.parametrize("count", [0, 2, 5, 3000])
def test_results_take_the_rows_of_the_ring_in_turn(count: int, device: torch.device, rng: torch.Generator) -> None:
    """A step for nobody leaves its row to the next one."""
    rings = [torch.full((3, 10000), -1, dtype=torch.int32, device=d) for d in (device, "cpu")]
    turns = [torch.tensor([5], device=d) for d in (device, "cpu")]
    for slots in ([1, 7], [7, 7], [2, 3], [0, 7]):
        for offset, words, last in ((3100, 2 * count, False), (2, count, True)):
            wanted = torch.randint(-(2**31), 2**31 - 1, (words,), generator=rng, dtype=torch.int64).int()
            for put, ring, turn in zip((publish, publish_reference), rings, turns, strict=True):
                put(ring, turn, wanted.to(ring.device), torch.tensor(slots, device=ring.device), 7, offset, last=last)
        assert torch.equal(rings[0].cpu(), rings[1])
        assert turns[0].item() == turns[1].item()
    assert turns[1].item() == 8
