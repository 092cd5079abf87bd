"""Products of few rows and block-FP8 quantisation against `F.linear` and `kernels.block_fp8`."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fluentllm.kernels.block_fp8 import dequantise_rows, linear_reference, quantise_rows_reference, quantise_weight
from fluentllm.kernels.triton.fp8_gemm import GemmTile, fp8_gemm
from fluentllm.kernels.triton.fp8_quantise import quantise_rows, silu_mul_quantise
from fluentllm.kernels.triton.linear import linear, new_counters
from fluentllm.kernels.triton.linear_tiles import LinearTile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def assert_quantised(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to one step of E4M3. The interpreter's cast (Triton 3.9) loses a carry now and then: there most must be."""
    close = (got - expected).abs() <= expected.abs() * 0.13 + 1e-9 * expected.abs().max()
    assert close.float().mean() >= (0.9 if INTERPRETED else 1)


TILES = [
    LinearTile(8, 16, 32, 1, 3, tma=False),
    LinearTile(8, 16, 32, 3, 3),
    LinearTile(16, 64, 64, 2, 2),
    LinearTile(32, 32, 16, 4, 2, tma=False),
    None,
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("tokens", "rows", "depth"), [(1, 48, 80), (5, 70, 200), (19, 16, 64), (0, 32, 32)])
def test_linear(
    tokens: int, rows: int, depth: int, tile: LinearTile | None, device: torch.device, rng: torch.Generator
) -> None:
    x = torch.randn(tokens, depth + 8, generator=rng).to(torch.bfloat16)[:, :depth]
    weight = torch.randn(rows, depth, generator=rng).to(torch.bfloat16) * depth**-0.5
    other = torch.randn(tokens, rows, generator=rng).to(torch.bfloat16)
    counters = new_counters(rows, device)
    expected = F.linear(x.float(), weight.float())
    for _ in range(2):  # the counters must be left as they were found
        out = linear(x.to(device), weight.to(device), tile=tile, counters=counters)
        assert_close(out.cpu().float(), expected, rtol=2e-2, atol=2e-2)
    both = linear(x.to(device), weight.to(device), other=other.to(device), factor=0.25, tile=tile, counters=counters)
    assert_close(both.cpu().float(), (expected + other.float()) * 0.25, rtol=2e-2, atol=2e-2)
    biased = linear(x.to(device), weight.to(device), other=other.flatten()[:rows].to(device), tile=tile) if tokens else None
    if biased is not None:
        assert_close(biased.cpu().float(), expected + other.flatten()[:rows].float(), rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("tile", TILES)
def test_gate_and_up(tile: LinearTile | None, device: torch.device, rng: torch.Generator) -> None:
    tokens, inner, depth = 6, 72, 96
    x = torch.randn(tokens, depth, generator=rng).to(torch.bfloat16)
    weight = torch.randn(2 * inner, depth, generator=rng).to(torch.bfloat16) * depth**-0.5
    gate, up = F.linear(x.float(), weight.float()).chunk(2, -1)
    out = linear(x.to(device), weight.to(device), gated=True, tile=tile)
    assert_close(out.cpu().float(), F.silu(gate) * up, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize(("tokens", "depth"), [(1, 128), (3, 200), (7, 640), (0, 256)])
def test_quantise(tokens: int, depth: int, device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(tokens, depth + 8, generator=rng)[:, :depth] * torch.logspace(-6, 6, depth)
    q, scale = quantise_rows(x.to(device))
    expected, expected_scale = quantise_rows_reference(x)
    assert_close(scale.cpu(), expected_scale)
    if tokens:
        assert_quantised(dequantise_rows(q.cpu(), scale.cpu()), dequantise_rows(expected, expected_scale))


def test_quantise_zeros_and_large(device: torch.device) -> None:
    q, scale = quantise_rows(torch.tensor([0.0, 3e38]).repeat_interleave(128)[None].to(device))
    assert torch.isfinite(dequantise_rows(q.cpu(), scale.cpu())).all()
    assert (q[:, :128].float() == 0).all()


def test_swiglu_quantised(device: torch.device, rng: torch.Generator) -> None:
    gate_up = torch.randn(3, 2 * 192, generator=rng)
    gate, up = gate_up.chunk(2, -1)
    q, scale = silu_mul_quantise(gate_up.to(device))
    expected = dequantise_rows(*quantise_rows_reference(F.silu(gate) * up))
    assert_quantised(dequantise_rows(q.cpu(), scale.cpu()), expected)


FP8_TILES = [LinearTile(8, 16, 128, 1, 3, tma=False), LinearTile(16, 64, 128, 2, 3), LinearTile(32, 128, 128, 1, 2), None]


@pytest.mark.parametrize("tile", FP8_TILES)
@pytest.mark.parametrize(("tokens", "rows", "depth"), [(1, 48, 128), (5, 144, 320), (17, 136, 400)])
def test_block_fp8(
    tokens: int, rows: int, depth: int, tile: LinearTile | None, device: torch.device, rng: torch.Generator
) -> None:
    x = torch.randn(tokens, depth, generator=rng)
    q, scale = quantise_rows_reference(x)
    weight, w_scale = quantise_weight(torch.randn(rows, depth, generator=rng) * torch.linspace(0.1, 10, rows)[:, None])
    expected = linear_reference(q, scale, weight, w_scale)
    operands = (t.to(device) for t in (q, weight))
    out = linear(
        *operands, x_scale=scale.to(device), w_scale=w_scale.to(device), tile=tile, counters=new_counters(rows, device),
        out_dtype=torch.float32,
    )  # fmt: skip
    assert_close(out.cpu(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("inner", [128, 200])
def test_block_fp8_gate_and_up(inner: int, device: torch.device, rng: torch.Generator) -> None:
    q, scale = quantise_rows_reference(torch.randn(3, 256, generator=rng))
    weight, w_scale = quantise_weight(torch.randn(2 * inner, 256, generator=rng) * 0.1)
    gate, up = linear_reference(q, scale, weight, w_scale).chunk(2, -1)
    operands = (t.to(device) for t in (q, weight))
    out = linear(*operands, x_scale=scale.to(device), w_scale=w_scale.to(device), gated=True)
    assert_close(out.cpu().float(), F.silu(gate) * up, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("tokens", "rows", "depth"), [(0, 16, 16), (70, 144, 272), (130, 40, 128)])
def test_block_fp8_of_many_rows(tokens: int, rows: int, depth: int, device: torch.device, rng: torch.Generator) -> None:
    q, scale = quantise_rows_reference(torch.randn(tokens, depth, generator=rng))
    weight, w_scale = quantise_weight(torch.randn(rows, depth, generator=rng) * torch.linspace(0.1, 10, rows)[:, None])
    expected = linear_reference(q, scale, weight, w_scale)
    operands = (t.to(device) for t in (q, scale, weight, w_scale))
    out = fp8_gemm(*operands, tile=GemmTile(64, 128, 4, 3), out_dtype=torch.float32)
    assert_close(out.cpu(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()) if tokens else 0)
