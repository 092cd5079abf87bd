"""Rows of a padded prefill pass, from a column a chunk."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from fluentllm.kernels.prefill_rows import PrefillRows, prefill_rows_reference
from fluentllm.kernels.triton.prefill_rows import prefill_rows


@pytest.mark.parametrize("lengths", [[1], [300, 1, 7], [255, 1], [1] * 9, [17, 512]])
@pytest.mark.parametrize("padding", [0, 3, 260])
def test_rows_of_ragged_chunks(lengths: list[int], padding: int, device: torch.device, rng: torch.Generator) -> None:
    sequences, real = 10, sum(lengths)
    rows = real + padding
    history = torch.randint(0, 1000, (sequences, 700), generator=rng, dtype=torch.int32).to(device)
    table = torch.randint(1, 99, (sequences, 44), generator=rng, dtype=torch.int32).to(device)
    slots = torch.randperm(sequences - 1, generator=rng)[: len(lengths)]
    starts = torch.randint(0, 100, (len(lengths),), generator=rng)
    counts = torch.tensor(lengths)
    given = torch.zeros(4, sequences, dtype=torch.int64)
    given[0], given[2] = sequences - 1, 2000
    given[:, : len(lengths)] = torch.stack((slots, starts, counts.cumsum(0) - counts, starts + counts))
    given[2, len(lengths)] = real
    made = []
    for fill in (prefill_rows, prefill_rows_reference):
        into = PrefillRows.create(sequences, 1024, device)
        for tensor in vars_of(into).values():
            tensor.fill_(-7)  # what was there before
        into.given.copy_(given)
        fill(into, real, rows, history, table, 16)
        made.append(vars_of(into))
    for name, ours in made[0].items():
        expected = made[1][name]
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected), name
    owners = [i for i, count in enumerate(lengths) for _ in range(count)]
    within = [row for count in lengths for row in range(count)]
    found = made[0]
    assert found["sequences"][:rows].tolist() == owners + [len(lengths)] * padding
    assert (
        found["positions"][:rows].tolist() == [int(starts[i]) + r for i, r in zip(owners, within, strict=True)] + [0] * padding
    )
    assert found["kv_rows"][real:rows].tolist() == [0] * padding
    assert found["query_start"].tolist()[len(lengths) + 1 :] == [rows] * (sequences - len(lengths))


def vars_of(rows: PrefillRows) -> dict[str, torch.Tensor]:
    return {field.name: getattr(rows, field.name) for field in fields(rows)}
