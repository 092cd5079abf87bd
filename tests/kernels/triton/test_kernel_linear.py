"""Products of few rows and block-FP8 quantisation against `F.linear` and `kernels.block_fp8`."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fluentllm.kernels.block_fp8 import (
    dequantise_rows,
    dequantise_weight,
    linear_reference,
    quantise_rows_reference,
    quantise_weight,
)
from fluentllm.kernels.triton.fp8_gemm import GemmTile, fp8_gemm
from fluentllm.kernels.triton.fp8_quantise import quantise_rows, silu_mul_quantise
from fluentllm.kernels.triton.held import MOST_TOKENS, HeldTile
from fluentllm.kernels.triton.linear import linear, linear_norm, new_counters
from fluentllm.kernels.triton.linear_tiles import LinearTile, Tile
from fluentllm.kernels.triton.moe_scores import normed_router_logits
from fluentllm.kernels.triton.normed import NormAfter, Normed
from fluentllm.kernels.triton.streamed_weight import StreamedFp8Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def assert_quantised(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to one step of E4M3. The interpreter's cast (Triton 3.9) loses the carry of a value in sixteen: there most must be,
    of a hundred values too."""
    close = (got - expected).abs() <= expected.abs() * 0.13 + 1e-9 * expected.abs().max()
    assert close.float().mean() >= (0.75 if INTERPRETED else 1)


TILES = [
    LinearTile(8, 16, 32, 1, 3, tma=False),
    LinearTile(8, 16, 32, 3, 3),
    LinearTile(16, 64, 64, 2, 2),
    LinearTile(32, 32, 16, 4, 2, tma=False),
    HeldTile(4, 32),
    HeldTile(1, 128),
    None,
]


def enough(tokens: int, rows: int, tile: Tile | None) -> tuple[int, int]:
    """A held tile's program has one row of the matrix, or four, and at most two tokens: hundreds of programs, each of them some
    milliseconds of the interpreter. There three tokens are as good as more: two programs, the second not full. So are two
    programs of rows and what `rows` has beyond full ones. No tile: few tokens get a held one."""
    held = isinstance(tile, HeldTile) or (tile is None and tokens <= MOST_TOKENS)
    return (min(tokens, 3), min(rows, 8 + rows % 4)) if INTERPRETED and held else (tokens, rows)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("tokens", "rows", "depth"), [(1, 48, 80), (2, 33, 72), (5, 70, 200), (19, 16, 64), (0, 32, 32)])
def test_linear(tokens: int, rows: int, depth: int, tile: Tile | None, device: torch.device, rng: torch.Generator) -> None:
    tokens, rows = enough(tokens, rows, tile)
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


@pytest.mark.parametrize("tokens", [1, 2, 6])
@pytest.mark.parametrize("tile", TILES)
def test_gate_and_up(tile: Tile | None, tokens: int, device: torch.device, rng: torch.Generator) -> None:
    depth = 96
    tokens, inner = enough(tokens, 72, tile)
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
def test_block_fp8(tokens: int, rows: int, depth: int, tile: Tile | None, device: torch.device, rng: torch.Generator) -> None:
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


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("tokens", "tile"), [(1, HeldTile(4, 128)), (2, HeldTile(2, 256)), (3, HeldTile(8, 64)), (0, None), (2, None)]
)
def test_rows_that_are_not_quantised_by_block_fp8(
    tokens: int, tile: Tile | None, gated: bool, device: torch.device, rng: torch.Generator
) -> None:
    """More blocks of scales than one in both directions, the last of each not full."""
    rows, depth = (136, 400) if gated else (150, 400)
    x = torch.randn(tokens, depth, generator=rng).to(torch.bfloat16)
    parts = [torch.randn(rows, depth, generator=rng) * size for size in ((0.02, 0.1) if gated else (0.02,))]
    weight, w_scale = quantise_weight(torch.cat([part * torch.linspace(0.1, 10, rows)[:, None] for part in parts]))
    expected = x.float() @ dequantise_weight(weight, w_scale).T
    if gated:
        gate, up = expected.to(torch.bfloat16).float().chunk(2, -1)
        expected = F.silu(gate) * up
    out = linear(x.to(device), weight.to(device), w_scale=w_scale.to(device), tile=tile, gated=gated, out_dtype=torch.bfloat16)
    # silu of a gate below -10 changes by as much as a rounding of the gate in BF16.
    assert_close(out.cpu().float(), expected, rtol=6e-2 if gated else 2e-2, atol=2e-2)


def test_rows_that_must_be_quantised_say_so(device: torch.device) -> None:
    weight, w_scale = quantise_weight(torch.randn(64, 128))
    with pytest.raises(ValueError, match="x_scale is missing"):
        linear(torch.randn(5, 128, device=device).bfloat16(), weight.to(device), w_scale=w_scale.to(device))


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


def normed_reference(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rows * torch.rsqrt((rows * rows).mean(1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("tokens", "rows", "depth"), [(1, 48, 80), (5, 128, 200), (19, 64, 64), (0, 32, 32)])
def test_a_norm_between_two_products(
    tokens: int, rows: int, depth: int, tile: Tile | None, device: torch.device, rng: torch.Generator
) -> None:
    """residual += x Wᵀ + other; y = norm(residual) Vᵀ; z = gated: the norm has no launch of its own."""
    eps = 1e-5
    tokens, inner = enough(tokens, 40, tile)
    x, other, residual = (
        torch.randn(tokens, n, generator=rng).to(torch.bfloat16) * s for n, s in ((depth, 1), (rows, 1), (rows, 30))
    )
    first, second = (
        torch.randn(a, b, generator=rng).to(torch.bfloat16) * b**-0.5 for a, b in ((rows, depth), (2 * inner, rows))
    )
    norm = (torch.rand(rows, generator=rng) + 0.5).to(torch.bfloat16)
    summed = residual.float() + (F.linear(x.float(), first.float()) + other.float())
    stream = residual.to(device)
    normed, whole = linear_norm(
        x.to(device), first.to(device), NormAfter(norm.to(device), eps, stream), other=other.to(device), tile=tile,
        counters=new_counters(rows, device),
    )  # fmt: skip
    assert_close(stream.cpu().float(), summed, rtol=1e-2, atol=0.1)
    assert whole.data_ptr() == normed.rows.data_ptr()
    expected = normed_reference(stream.cpu().float(), norm.float(), eps)
    assert_close(normed.tensor().cpu().float(), expected, rtol=1.5e-2, atol=1e-2)
    out = linear(normed, second.to(device), tile=tile, counters=new_counters(2 * inner, device))
    assert_close(out.cpu().float(), F.linear(expected, second.float()), rtol=2e-2, atol=3e-2)
    gate, up = F.linear(expected, second.float()).chunk(2, -1)
    gated = linear(normed, second.to(device), gated=True, tile=tile)
    assert_close(gated.cpu().float(), F.silu(gate) * up, rtol=3e-2, atol=4e-2)


@pytest.mark.parametrize("tile", [LinearTile(8, 16, 32, 1, 3, tma=False), LinearTile(16, 32, 64, 2, 2), None])
def test_a_norm_of_the_first_columns(tile: Tile | None, device: torch.device, rng: torch.Generator) -> None:
    """As MLA's down projection: the query latent is normed, the rest is as the product leaves it."""
    tokens, depth, width, rest, eps = 6, 96, 64, 40, 1e-6
    x = torch.randn(tokens, depth, generator=rng).to(torch.bfloat16)
    weight = torch.randn(width + rest, depth, generator=rng).to(torch.bfloat16) * depth**-0.5
    norm = (torch.rand(width, generator=rng) + 0.5).to(torch.bfloat16)
    bias = torch.randn(width + rest, generator=rng).to(torch.bfloat16)
    normed, whole = linear_norm(
        x.to(device), weight.to(device), NormAfter(norm.to(device), eps), other=bias.to(device), tile=tile,
        counters=new_counters(width + rest, device),
    )  # fmt: skip
    expected = F.linear(x.float(), weight.float(), bias.float())
    assert_close(whole[:, width:].cpu().float(), expected[:, width:], rtol=2e-2, atol=2e-2)
    assert_close(normed.tensor().cpu().float(), normed_reference(expected[:, :width], norm.float(), eps), rtol=2e-2, atol=3e-2)


def test_a_tile_across_the_normed_columns_is_refused(device: torch.device) -> None:
    x, weight, norm = (torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in ((1, 32), (64, 32), (40,)))
    with pytest.raises(ValueError, match="40 normed columns"):
        linear_norm(x, weight, NormAfter(norm, 1e-6), tile=LinearTile(8, 16, 32, 1, 3))


def test_a_norm_before_the_router(device: torch.device, rng: torch.Generator) -> None:
    for tokens in (0, 1, 7):
        rows = torch.randn(tokens, 96, generator=rng).to(torch.bfloat16)
        squares = (rows.float() ** 2 * 4).unflatten(1, (3, 32)).sum(-1).T.contiguous()
        normed = Normed(rows.to(device), squares.to(device), 1e-5)
        weight = torch.randn(10, 96, generator=rng)
        logits, finished = normed_router_logits(normed, weight.to(device))
        assert_close(finished.cpu().float(), normed.tensor().cpu().float(), rtol=8e-3, atol=1e-6)
        assert_close(logits.cpu(), F.linear(finished.cpu().float(), weight), rtol=1e-4, atol=1e-4)


def test_a_norm_between_fp8_products(device: torch.device, rng: torch.Generator) -> None:
    """What is quantised lacks each row's factor; the product gets it."""
    tokens, width = 3, 256
    residual, x = (torch.randn(tokens, width, generator=rng).to(torch.bfloat16) * s for s in (10, 1))
    matrices = [quantise_weight(torch.randn(width, width, generator=rng) / 16) for _ in range(2)]
    first, second = (StreamedFp8Weight(q.to(device), scale.to(device)) for q, scale in matrices)
    norm = torch.rand(width, generator=rng).to(torch.bfloat16) + 0.5
    stream = residual.to(device)
    normed, _ = first.stream_norm(x.to(device), NormAfter(norm.to(device), 1e-5, stream))
    assert_close(
        normed.tensor().cpu().float(), normed_reference(stream.cpu().float(), norm.float(), 1e-5), rtol=1.5e-2, atol=1e-2
    )
    q, scale = quantise_rows(normed.rows)
    factor = torch.rsqrt(normed.squares.sum(0) / width + 1e-5).cpu()
    expected = linear_reference(q.cpu(), scale.cpu(), *matrices[1]) * factor[:, None]
    assert_close(second.stream(normed).cpu().float(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
