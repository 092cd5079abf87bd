"""Norms, gates, rotary and embedding against `PlainOps`."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.elementwise import embedding, rotary, silu_mul
from fluentllm.kernels.triton.norm import add_rms_norm, draft_input, rms_norm

PLAIN = PlainOps()


@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 576), (3, 1024), (2, 50)])
def test_norms(rows: int, size: int, device: torch.device, rng: torch.Generator) -> None:
    x, delta = (torch.randn(rows, size, generator=rng).to(device) for _ in range(2))
    weight = (torch.rand(size, generator=rng) + 0.5).to(device)
    assert_close(rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))
    residual, expected = x.clone(), x.clone()
    out = add_rms_norm(delta, residual, weight, 1e-5)
    assert_close(out, PLAIN.add_rms_norm(delta, expected, weight, 1e-5))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 576), (5, 1024), (4, 50)])
def test_what_a_draft_layer_begins_with(rows: int, size: int, device: torch.device, rng: torch.Generator) -> None:
    """Position 0 has no state before it."""
    table, states = torch.randn(30, size, generator=rng).to(device), torch.randn(rows, size, generator=rng).to(device)
    norms = [(torch.rand(size, generator=rng) + 0.5).to(device) for _ in range(2)]
    tokens = torch.randint(0, 30, (rows,), generator=rng).to(device)
    positions = torch.randint(0, 3, (rows,), generator=rng).to(device)
    expected = PLAIN.draft_input(tokens, positions, table, states, *norms, 1e-5)
    assert_close(draft_input(tokens, positions, table, states, *norms, 1e-5), expected)
    assert not expected[positions == 0, size:].any()


def test_norm_of_a_slice_and_of_heads(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(3, 100, generator=rng).to(device)
    weight = torch.rand(20, generator=rng).to(device)
    assert_close(rms_norm(x[:, 40:60], weight, 1e-5), PLAIN.rms_norm(x[:, 40:60].contiguous(), weight, 1e-5))
    heads = x.view(3, 5, 20)[:, 1:4]
    assert_close(rms_norm(heads, weight, 1e-5), PLAIN.rms_norm(heads.contiguous(), weight, 1e-5))


@pytest.mark.parametrize(("rows", "size"), [(0, 8), (3, 96), (2, 1500)])
def test_silu_mul(rows: int, size: int, device: torch.device, rng: torch.Generator) -> None:
    gate_up = torch.randn(rows, 2 * size, generator=rng).to(device)
    assert_close(silu_mul(gate_up), PLAIN.silu_mul(gate_up))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "width"), [(3, 64, 64), (1, 64, 32), (5, 96, 96)])
def test_rotary(heads: int, dim: int, width: int, interleaved: bool, device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(4, heads + 2, dim, generator=rng).to(device)[:, 1:-1]
    cos, sin = (torch.randn(4, 1, width, generator=rng).to(device) for _ in range(2))
    assert_close(rotary(x, cos, sin, interleaved=interleaved), PLAIN.rotary(x, cos, sin, interleaved=interleaved))


def test_embedding(device: torch.device, rng: torch.Generator) -> None:
    table = torch.randn(30, 1100, generator=rng).to(device)
    tokens = torch.randint(0, 30, (7,), generator=rng).to(device)
    assert torch.equal(embedding(tokens, table), table[tokens])
    assert embedding(tokens[:0], table).shape == (0, 1100)
