"""Prompt lookup on whole batches against the plain search in one history."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluentllm.core.slots import SlotTables
from fluentllm.kernels.prompt_lookup import prompt_lookup, prompt_lookup_on_host, prompt_lookup_reference
from fluentllm.plugins.spec_pld.proposer import PromptLookup


@pytest.mark.parametrize(("shortest", "longest", "count"), [(1, 3, 4), (2, 4, 3), (3, 3, 1), (1, 1, 6)])
def test_drafts_are_what_the_plain_search_finds(shortest: int, longest: int, count: int) -> None:
    rng = random.Random(shortest * 100 + longest * 10 + count)
    histories = [rng.choices(range(4), k=rng.randint(1, 40)) for _ in range(60)]
    table = torch.randint(0, 4, (60, 50), dtype=torch.int32)
    for row, tokens in enumerate(histories):
        table[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    lengths = torch.tensor([len(tokens) for tokens in histories])
    drafts, valid = prompt_lookup(table, lengths, count, shortest, longest)
    found = [drafts[row, : int(valid[row])].tolist() for row in range(60)]
    assert found == [prompt_lookup_reference(tokens, count, shortest, longest) for tokens in histories]
    assert sum(map(bool, found)) > 0
    slots = torch.tensor(rng.choices(range(60), k=80))
    on_host, valid_on_host = prompt_lookup_on_host(table, slots, lengths[slots], count, shortest, longest)
    assert torch.equal(valid_on_host, valid[slots])
    assert torch.equal(on_host, torch.where(valid_on_host.unsqueeze(1) > 0, drafts[slots], 0))


def test_no_slots() -> None:
    drafts, valid = prompt_lookup(torch.empty(0, 10, dtype=torch.int32), torch.empty(0, dtype=torch.int64), 2, 1, 3)
    assert drafts.shape == (0, 2)
    assert valid.shape == (0,)
    slots = torch.empty(0, dtype=torch.int64)
    drafts, valid = prompt_lookup_on_host(torch.empty(3, 10, dtype=torch.int32), slots, slots, 2, 1, 3)
    assert drafts.shape == (0, 2)
    assert valid.shape == (0,)


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_lookup_on_a_cpu_is_cheap() -> None:
    """It is made in every step of a stream, and what it takes there is torch's operations: 86 took 3 % of SmolLM2's."""
    tables = SlotTables(4, 64, 16, 100, torch.device("cpu"), max_drafts=4)
    tables.history[1, :6] = torch.tensor([7, 8, 9, 1, 7, 8])
    tables.length[1] = 6
    with Operations() as operations:
        drafts, valid = PromptLookup(tables, 2, 4)._look_up(torch.tensor([1]), 3)
    assert (drafts.tolist(), valid.tolist()) == ([[9, 1, 7]], [3])
    assert operations.count < 15, operations.count
