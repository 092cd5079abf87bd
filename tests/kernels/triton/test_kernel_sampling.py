"""Draws and filters against the step program's own."""

from __future__ import annotations

import pytest
import torch

from fluentllm.kernels.sampling import filter_logits, gumbel_noise
from fluentllm.kernels.triton.draw import argmax, draw
from fluentllm.kernels.triton.filter import filter_thresholds

NEAR = 1e-4
"""Two scores this close may change places: the logarithms of the noise differ in their last bits."""


def test_argmax_takes_the_lowest_of_equals(device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randint(0, 50, (5, 9000), generator=rng).float().to(device)
    assert torch.equal(argmax(logits).cpu(), logits.cpu().argmax(1))
    assert argmax(logits[:0]).shape == (0,)


def test_a_nan_loses(device: torch.device) -> None:
    logits = torch.tensor([[0.0, float("nan"), 3.0, 2.0]], device=device)
    assert argmax(logits).tolist() == [2]


@pytest.mark.parametrize("vocab", [7, 5000, 12_001])
def test_draws_agree_but_for_near_ties(vocab: int, device: torch.device, rng: torch.Generator) -> None:
    rows, slots = 6, 9
    logits = torch.randn(rows, vocab, generator=rng)
    floats = torch.rand(slots, 6, generator=rng) + 0.3
    floats[::3, 0] = 0.0
    ints = torch.randint(-(2**62), 2**62, (slots, 8), generator=rng)
    row_slots = torch.randint(0, slots, (rows,), generator=rng)
    positions = torch.randint(0, 100_000, (rows,), generator=rng)
    heat = floats[row_slots, 0]
    scores = logits / heat.where(heat > 0, 1.0).unsqueeze(1) + gumbel_noise(ints[row_slots, 6], positions, vocab)
    scores = torch.where((heat > 0).unsqueeze(1), scores, logits)

    tables = ints.to(device), floats.to(device)
    drawn = draw(logits.to(device), row_slots.to(device), positions.to(device), tables[1][:, 0], tables[0][:, 6]).cpu()
    best = scores.amax(1)
    assert torch.all(best - scores.gather(1, drawn.unsqueeze(1)).squeeze(1) < NEAR)
    ties = (scores > best.unsqueeze(1) - NEAR).sum(1) > 1
    assert torch.equal(drawn[~ties], scores.argmax(1)[~ties])
    assert ties.sum() <= 1


def kept_by(thresholds: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    return scaled >= thresholds.cpu().unsqueeze(1)


def test_thresholds_keep_what_the_filter_keeps(device: torch.device, rng: torch.Generator) -> None:
    rows, vocab = 8, 3000
    logits = torch.randn(rows, vocab, generator=rng) * 3
    floats, ints = torch.zeros(rows, 6), torch.zeros(rows, 8, dtype=torch.int64)
    temperature, top_p, min_p, top_k = floats[:, 0], floats[:, 1], floats[:, 2], ints[:, 4]
    temperature.copy_(torch.rand(rows, generator=rng) + 0.5)
    top_k.copy_(torch.tensor([0, 1, 40, 5000, 0, 3, 0, 7]))
    top_p.copy_(torch.tensor([0.9, 1.0, 0.7, 1.0, 1.0, 1.0, 0.3, 0.0]))
    min_p.copy_(torch.tensor([0.0, 0.0, 0.01, 0.0, 0.2, 0.0, 0.1, 0.0]))
    scaled = logits / temperature.unsqueeze(1)
    expected = filter_logits(scaled, top_k, top_p, min_p).isfinite()
    floats, ints = floats.to(device), ints.to(device)
    slots = torch.arange(rows, device=device)
    thresholds = filter_thresholds(logits.to(device), slots, floats[:, 0], ints[:, 4], floats[:, 1], floats[:, 2])
    kept = kept_by(thresholds, scaled)
    # One token at the border may fall to either side: sums of the mass round differently.
    assert ((kept != expected).sum(1) <= 1).all()
    assert torch.equal(kept[[1, 3, 5, 7]], expected[[1, 3, 5, 7]])  # no sums involved
    assert thresholds[3] == float("-inf")


def test_a_filtered_draw_stays_within_the_filter(device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randn(8, 500, generator=rng).to(device)
    floats = torch.tensor([[4.0, 1.0, 0.0]], device=device)
    ints = torch.tensor([[5, 1234]], device=device)
    slots = torch.zeros(8, dtype=torch.int64, device=device)
    thresholds = filter_thresholds(logits, slots, floats[:, 0], ints[:, 0], floats[:, 1], floats[:, 2])
    drawn = draw(logits, slots, torch.arange(8, device=device), floats[:, 0], ints[:, 1], thresholds)
    assert (drawn.unsqueeze(1) == logits.topk(5, dim=1).indices).any(1).all()
    assert (drawn != logits.argmax(1)).any()
