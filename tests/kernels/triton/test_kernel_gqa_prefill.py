"""Prefill attention over paged KV: ragged chunks behind cached prefixes."""

from __future__ import annotations

import pytest
import torch
from paged import random_paged

from fluentllm.kernels.attention_reference import gqa_reference
from fluentllm.kernels.triton.gqa_prefill import gqa_prefill
from fluentllm.kernels.triton.gqa_prefill_plan import LEAST_RUN, MOST_SPLITS, PaddedPlans, PrefillPlan
from fluentllm.kernels.triton.launch import split_width


@pytest.mark.parametrize(
    ("chunks", "heads", "kv_heads", "dim", "page_size", "tile", "dtype"),
    [
        ([(0, 1)], 2, 1, 64, 16, 128, torch.float32),
        ([(0, 130), (70, 3), (128, 64), (0, 0)], 4, 2, 64, 16, 64, torch.float32),
        ([(5, 65), (0, 20)], 3, 1, 96, 32, 32, torch.float16),
        ([(40, 9)], 18, 1, 64, 16, 16, torch.float32),
        ([(200, 40)], 2, 2, 128, 64, 128, torch.bfloat16),
        ([(20, 9)], 2, 2, 192, 16, 16, torch.float32),
    ],
)
@pytest.mark.parametrize("splits", [1, 2, 11])
def test_ragged_chunks(
    chunks: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, page_size: int, tile: int, dtype: torch.dtype,
    splits: int, device: torch.device, rng: torch.Generator,
) -> None:  # fmt: skip
    """chunks: (cached keys, rows). With more splits than blocks of keys some programs have none, of a tile or of a row; a group
    of heads may be too large for a tile."""
    lengths = [cached + rows for cached, rows in chunks]
    counts = [rows for _, rows in chunks]
    paged = random_paged(lengths, rng, device, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype)
    q = torch.randn(sum(counts), heads, dim, generator=rng).to(device, dtype)
    plan = PrefillPlan(counts, lengths, device, rows=tile, splits=splits)
    out = gqa_prefill(q, paged.k, paged.v, paged.table, plan, dim**-0.5)
    start = 0
    for i, (cached, rows) in enumerate(chunks):
        part = slice(start, start + rows)
        k, v = paged.keys(i)
        expected = gqa_reference(q[part].double(), k, v, torch.arange(cached, cached + rows), dim**-0.5)
        tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 4e-2}[dtype]
        torch.testing.assert_close(out[part].double(), expected, rtol=0, atol=tolerance)
        start += rows


@pytest.mark.parametrize(("chunks", "padding"), [([(0, 1)], 3), ([(70, 3), (0, 130), (128, 64)], 27), ([(1100, 9)], 1)])
@pytest.mark.parametrize(("heads", "kv_heads", "tile"), [(4, 2, 32), (9, 1, 16)])
def test_padded_passes_see_no_keys_for_their_padding(
    chunks: list[tuple[int, int]], padding: int, heads: int, kv_heads: int, tile: int, device: torch.device,
    rng: torch.Generator,
) -> None:  # fmt: skip
    """The same plans, pass after pass, in the tensors of the one before; the heads of nine share keys, and a tile has room for
    one token of theirs."""
    plans = PaddedPlans(heads, kv_heads, device, rows=tile)
    for _ in range(2):
        lengths = [cached + rows for cached, rows in chunks]
        counts = [rows for _, rows in chunks]
        own = sum(counts)
        paged = random_paged(lengths, rng, device, kv_heads=kv_heads, dim=64)
        q = torch.randn(own + padding, heads, 64, generator=rng).to(device)
        padded = plans.plan(counts, lengths, own + padding)
        out = gqa_prefill(q, paged.k, paged.v, paged.table, padded, 0.125)
        plain = PrefillPlan(counts, lengths, device, rows=tile, splits=1)
        expected = gqa_prefill(q[:own].contiguous(), paged.k, paged.v, paged.table, plain, 0.125)
        torch.testing.assert_close(out[:own], expected, rtol=0, atol=2e-6)
        assert out[own:].count_nonzero() == 0
        chunks = [(cached + 1, rows) for cached, rows in reversed(chunks)]


def test_padded_plans_are_few() -> None:
    """How sequences divide the rows of a pass changes neither its grid nor where its tiles stand, but for many short ones."""
    plans = PaddedPlans(16, 8, torch.device("cpu"))
    made = [plans.plan(counts, counts, 1024) for counts in ([1000], [300, 500, 200], [1] * 24 + [1000], [10] * 80)]
    assert {plan.key for plan in made[:3]} == {(72, 1, 1)}
    assert made[0].made.table is made[1].made.table
    assert made[3].key == (264, 1, 1)
    (split,) = {plans.plan([count], [50_000], 16).key for count in range(1, 17)}
    assert split == (5, 2, 32), "a power of two"


def test_keys_are_shared_where_tiles_do_not_fill_the_chip() -> None:
    """Of 132 multiprocessors, twice."""

    def planned(tokens: int, keys: int, heads: int, kv_heads: int) -> tuple[int, int, int]:
        tiles = PrefillPlan([tokens], [keys], torch.device("cpu")).tiles(heads, kv_heads)
        return tiles.table.shape[1], tiles.pack, tiles.splits

    assert planned(40, 100_000, 32, 8) == (2, 4, 16)
    assert planned(40, 100_000, 16, 16) == (1, 1, 16)
    assert planned(1, 100_000, 1, 1) == (1, 1, MOST_SPLITS)
    assert planned(43, 100_000, 9, 3) == (2, 3, 44)
    assert planned(1, 100_000, 256, 1) == (1, 1, 1)
    assert planned(1, 100_000, 130, 1) == (1, 1, 2)
    assert planned(40, 2 * LEAST_RUN, 32, 8) == (2, 4, 2)
    assert planned(40, 2 * LEAST_RUN - 1, 32, 8) == (1, 1, 1)
    assert planned(1024, 100_000, 32, 8) == (8, 1, 1)
    assert planned(0, 100_000, 32, 8) == (0, 1, 1)


def test_a_width_that_is_no_power_of_two_is_two() -> None:
    assert [split_width(n) for n in (8, 64, 96, 128, 160, 192, 224, 256)] == [
        (16, 0), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64), (256, 0), (256, 0),
    ]  # fmt: skip


def test_no_rows(device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([4], rng, device, kv_heads=1, dim=64)
    out = gqa_prefill(torch.zeros(0, 2, 64, device=device), paged.k, paged.v, paged.table, PrefillPlan([0], [4], device), 1.0)
    assert out.shape == (0, 2, 64)


def test_tiles_with_the_most_keys_come_first() -> None:
    table = PrefillPlan([100, 300], [1000, 300], torch.device("cpu")).tiles(64, 8).table
    assert table.T.tolist() == [[0, 0, 100, 900], [1, 356, 44, 256], [1, 228, 128, 128], [1, 100, 128, 0]]
