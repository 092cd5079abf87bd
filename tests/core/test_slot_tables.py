"""What the host writes into the slot tables."""

from __future__ import annotations

import random

import pytest
import torch

from fluentllm.core.slots import SlotTables
from fluentllm.core.types import PageGrant

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 17])
def test_grants_of_a_step_are_written_together(count: int, device: str) -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    tables = SlotTables(count, 1000, 16, 50, torch.device(device), max_drafts=2)
    tables.page_table.fill_(7)
    expected = tables.page_table.cpu()
    grants = []
    for slot in rng.sample(range(count), rng.randint(1, count)):
        first = rng.randrange(tables.max_pages)
        pages = [rng.randrange(5000) for _ in range(rng.randint(0, tables.max_pages - first))]
        grants.append(PageGrant(slot, first, pages))
        expected[slot, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)
    tables.grant(grants)
    assert torch.equal(tables.page_table.cpu(), expected)
