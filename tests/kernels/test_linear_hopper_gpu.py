"""Hopper's two kernels of products of few rows, beside the streaming one and the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fluentllm.kernels.block_fp8 import linear_reference, quantise_weight
from fluentllm.kernels.cuda.linear_cluster import ClusterTile
from fluentllm.kernels.triton.fp8_quantise import quantise_rows
from fluentllm.kernels.triton.hopper_tiles import HopperTile, fits
from fluentllm.kernels.triton.linear import linear, linear_norm, new_counters
from fluentllm.kernels.triton.linear_tiles import LinearTile, Tile, streamed_tile
from fluentllm.kernels.triton.normed import NormAfter, Normed

pytestmark = pytest.mark.gpu(capability=(9, 0))
DEVICE = torch.device("cuda")
WIDTHS = [(1, 8), (7, 8), (8, 8), (16, 16), (29, 32), (64, 64)]
"""Tokens, and a tile's."""


def operands(tokens: int, rows: int, depth: int, *, fp8: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(tokens, depth, device=DEVICE).bfloat16()
    weight = torch.randn(rows, depth, device=DEVICE) * depth**-0.5
    if not fp8:
        return x, weight.bfloat16(), {}
    q, scale = quantise_weight(weight)
    x_q, x_scale = quantise_rows(x)
    return x_q, q, {"x_scale": x_scale, "w_scale": scale}


def close(got: torch.Tensor, expected: torch.Tensor, error: float = 4e-3) -> None:
    assert got.shape == expected.shape
    assert (got.float() - expected.float()).norm() <= error * expected.float().norm()


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("tokens", "wide"), WIDTHS)
@pytest.mark.parametrize(
    ("rows", "depth", "make"),
    [
        (2048, 6144, lambda wide: ClusterTile(wide, 6)),
        (2112, 2048, lambda wide: ClusterTile(wide, 4)),
        (2048, 2816, lambda wide: ClusterTile(wide, 3)),  # parts of different depths
        (2048, 6144, lambda wide: ClusterTile(wide, 7)),
        (6144, 12288, lambda wide: ClusterTile(wide, 2)),  # deeper than the ring
        (200, 1040, lambda wide: ClusterTile(wide, 8)),  # neither rows nor columns fill a tile
        (136, 16, lambda wide: ClusterTile(wide, 1)),
        (6144, 1536, lambda wide: HopperTile(wide, 1)),
        (200, 144, lambda wide: HopperTile(wide, 2)),
        (1000, 1040, lambda wide: HopperTile(wide, 1, 3)),  # several tiles a program, the last one fewer
        (136, 16, lambda wide: HopperTile(wide, 1)),
    ],
)
def test_products(rows: int, depth: int, make: Callable[[int], Tile], tokens: int, wide: int, fp8: bool) -> None:
    torch.manual_seed(rows + tokens)
    x, weight, scales = operands(tokens, rows, depth, fp8=fp8)
    tile = make(wide)
    bias = torch.randn(rows, device=DEVICE).bfloat16()
    expected = linear_reference(x, scales["x_scale"], weight, scales["w_scale"]) if fp8 else x.float() @ weight.float().T
    out = linear(x, weight, **scales, other=bias, factor=0.5, tile=tile)
    close(out, (expected + bias.float()) * 0.5)
    again = linear(x, weight, **scales, other=bias, factor=0.5, tile=tile)
    assert torch.equal(out, again), "a moving result is a race"


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("tokens", "wide"), WIDTHS)
@pytest.mark.parametrize(("rows", "depth"), [(1408, 2048), (128, 272), (6144, 3072)])
def test_gated_and_normed_inputs(rows: int, depth: int, tokens: int, wide: int, fp8: bool) -> None:
    torch.manual_seed(rows + tokens)
    x, weight, scales = operands(tokens, 2 * rows, depth, fp8=fp8)
    squares = torch.rand(9, tokens, device=DEVICE) * depth
    plain = LinearTile(wide, 64, 128 if fp8 else 64, 1, 3)
    for rows_of_x in (x, Normed(x, squares, 1e-6)):
        expected = linear(rows_of_x, weight, **scales, gated=True, tile=plain)
        whole = [HopperTile(wide, 1), HopperTile(wide, 1, 2), HopperTile(wide, 2)]
        width = weight.element_size()
        tiles = [tile for tile in whole if fits(tile, depth, width, gated=True)]
        tiles += [tile for n in (1, 3, 4, 8) if (tile := ClusterTile(wide, n)).fits(tokens, depth, width, gated=True)]
        assert len(tiles) > 3
        for tile in tiles:
            close(linear(rows_of_x, weight, **scales, gated=True, tile=tile), expected)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("tokens", "wide"), WIDTHS)
@pytest.mark.parametrize(("rows", "depth", "normed"), [(2048, 2816, 2048), (2112, 2048, 1536), (576, 128, 512)])
def test_norms_behind(rows: int, depth: int, normed: int, tokens: int, wide: int, fp8: bool) -> None:
    torch.manual_seed(rows + tokens)
    x, weight, scales = operands(tokens, rows, depth, fp8=fp8)
    norm = torch.rand(normed, device=DEVICE).bfloat16()
    counters = new_counters(rows, DEVICE)
    found = []
    for tile in (
        LinearTile(wide, 64, 128 if fp8 else 64, 1, 3),
        HopperTile(wide, 1),
        ClusterTile(wide, 3),
        ClusterTile(wide, 2),
    ):
        torch.manual_seed(1)
        residual = torch.randn(tokens, rows, device=DEVICE).bfloat16() if normed == rows else None
        after = NormAfter(norm, 1e-6, residual)
        first, whole = linear_norm(x, weight, after, **scales, counters=counters, tile=tile)
        found.append((first.tensor(), whole, residual))
    expected, expected_whole, expected_residual = found[0]
    for first, whole, residual in found[1:]:
        close(first, expected)
        close(whole, expected_whole)
        if residual is not None and expected_residual is not None:
            close(residual, expected_residual)


def test_ends_of_other_types() -> None:
    """A bias, a stream and a norm's weight in float32 around a product in BF16."""
    torch.manual_seed(0)
    x, weight, scales = operands(5, 128, 2048, fp8=True)
    norm, stream = torch.rand(128, device=DEVICE), torch.randn(5, 128, device=DEVICE)
    found = []
    for tile in (HopperTile(8, 1), ClusterTile(8, 4)):
        residual = stream.clone()
        after = NormAfter(norm, 1e-6, residual)
        first, whole = linear_norm(x, weight, after, **scales, other=stream[0], tile=tile)
        found.append((first.tensor(), whole, residual))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        close(one, other)


def test_programs_of_other_products_run_between() -> None:
    """Products that follow each other start early, and end in the shared memory of programs of their own cluster alone."""
    torch.manual_seed(0)
    cases = [operands(tokens, rows, 2048, fp8=True) for tokens, rows in ((8, 2112), (64, 2048), (8, 4096), (33, 512))]
    tiles = [ClusterTile(8, 6), ClusterTile(64, 5), ClusterTile(8, 3), ClusterTile(64, 8)]
    expected = [linear_reference(x, s["x_scale"], w, s["w_scale"]) for x, w, s in cases]
    for _ in range(3):
        found = [linear(x, w, **s, tile=t) for _ in range(5) for (x, w, s), t in zip(cases, tiles, strict=True)]
        for i, out in enumerate(found):
            close(out, expected[i % 4])


def test_what_takes_it() -> None:
    assert isinstance(streamed_tile(64, 2048, 6144, 1, False, DEVICE), ClusterTile)
    assert isinstance(streamed_tile(32, 2048, 6144, 2, False, DEVICE), ClusterTile)
    assert isinstance(streamed_tile(64, 6144, 1536, 1, False, DEVICE), HopperTile)
    assert isinstance(streamed_tile(33, 2048, 6144, 2, False, DEVICE), LinearTile)


def test_what_it_cannot_do_is_refused() -> None:
    x, weight, scales = operands(3, 128, 256, fp8=True)
    with pytest.raises(ValueError, match="fit"):
        linear(x, weight, **scales, tile=ClusterTile(2, 1))
    with pytest.raises(ValueError, match="shared memory"):
        linear(x, weight, **scales, tile=HopperTile(64, 8))
    with pytest.raises(ValueError, match="aligned"):
        linear(x[:, 1:129], weight[:, :128], x_scale=scales["x_scale"][:1], w_scale=scales["w_scale"][:, :1],
               tile=HopperTile(8, 1))  # fmt: skip
    with pytest.raises(ValueError, match="aligned"):
        linear(x[:, 1:129], weight[:, :128], x_scale=scales["x_scale"][:1], w_scale=scales["w_scale"][:, :1],
               tile=ClusterTile(8, 1))  # fmt: skip
