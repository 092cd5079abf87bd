"""Noise and filters against their plain forms."""

from __future__ import annotations

import pytest
import torch

from fluentllm.kernels.sampling import filter_logits, filter_logits_reference, gumbel_noise


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_filters_keep_what_sorting_keeps(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 1000, generator=generator) * 3
    top_k = torch.randint(0, 60, (rows,), generator=generator)
    top_p = torch.rand(rows, generator=generator)
    min_p = torch.rand(rows, generator=generator) * 0.2
    expected = filter_logits_reference(logits, top_k, top_p, min_p)
    assert torch.equal(filter_logits(logits, top_k, top_p, min_p), expected)


def test_filters_that_are_off_change_nothing() -> None:
    logits = torch.randn(4, 333)
    off = filter_logits(logits, torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.zeros(4))
    assert torch.equal(off, logits)


def test_the_most_likely_token_survives_any_filter() -> None:
    logits = torch.randn(2, 50)
    kept = filter_logits(logits, torch.tensor([1, 0]), torch.tensor([0.0, 1e-9]), torch.tensor([1.0, 1.0]))
    assert torch.equal(kept.isfinite().sum(1), torch.tensor([1, 1]))
    assert torch.equal(kept.argmax(1), logits.argmax(1))


def test_ties_with_the_last_token_kept_are_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    kept = filter_logits(logits, torch.tensor([2]), torch.ones(1), torch.zeros(1))
    assert kept.isfinite().tolist() == [[True, True, True, False]]


def test_filters_of_no_rows() -> None:
    empty = torch.empty(0, 10)
    assert filter_logits(empty, torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)).shape == (0, 10)


def test_noise_depends_on_seed_and_position_only() -> None:
    seeds = torch.tensor([7, 7, 2**40 + 7, -7])
    positions = torch.tensor([3, 4, 3, 3])
    together = gumbel_noise(seeds, positions, 500)
    for row in range(4):
        assert torch.equal(together[row : row + 1], gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 500))
    assert all(not torch.equal(together[0], together[row]) for row in (1, 2, 3))


def test_noise_is_finite_where_the_hash_is_largest() -> None:
    # With 24 bits of hash the largest uniform rounds to 1, and one token of this row had infinite noise.
    assert gumbel_noise(torch.tensor([208]), torch.tensor([7]), 2**17).isfinite().all()


def test_noise_draws_from_the_softmax() -> None:
    """Chi-square of 100,000 draws over 8 tokens: 99.9 % quantile of 7 degrees of freedom is 24.3."""
    draws = 100_000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2])
    noise = gumbel_noise(torch.full((draws,), 1234), torch.arange(draws), 8)
    counts = torch.bincount((logits + noise).argmax(1), minlength=8)
    expected = torch.softmax(logits, 0) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3


def test_noise_of_consecutive_positions_is_independent() -> None:
    noise = gumbel_noise(torch.full((4000,), 5), torch.arange(4000), 16)
    pairs = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 0.02
    assert noise.isfinite().all()
