"""The router's product of many tokens against one in float64: as accurate as torch's in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton import moe_scores
from fluentllm.kernels.triton.launch import recording
from fluentllm.kernels.triton.moe_scores_wide import (
    MOST_SPLIT_TILES,
    RouterWeight,
    WideTile,
    new_counters,
    wide_router_logits,
    wide_tile,
)
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.kernels.weights import DenseWeight

TILE = WideTile(128, 2, 32, 6)


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.cpu().double() - exact).square().mean().sqrt())


def check(x: torch.Tensor, weight: torch.Tensor, device: torch.device, tile: WideTile | None = None) -> None:
    """x BF16 and weight float32, on a CPU. Twice torch's own error, and one rounding of the result, are allowed."""
    exact = F.linear(x.double(), weight.double())
    x, weight = x.to(device), weight.to(device)
    counters = new_counters(device)
    logits = wide_router_logits(x, weight, counters=counters, tile=tile)
    assert logits.shape == exact.shape
    assert logits.dtype is torch.float32
    assert not counters.any()
    plain = error(F.linear(x.float(), weight), exact)
    assert error(logits, exact) <= 2 * plain + 2.0**-24 * float(exact.square().mean().sqrt())


# Under the interpreter a program takes a tenth of a second: wide tiles, few splits.
@pytest.mark.parametrize(
    ("tokens", "hidden", "total", "tile"),
    [
        (257, 2048, 64, WideTile(64, 2, 64, 4)),
        (300, 768, 192, WideTile(128, 2, 32, 6)),
        (512, 2048, 24, WideTile(128, 1, 32, 6)),
        (1000, 520, 70, WideTile(128, 1, 64, 4)),
        (40, 1000, 8, WideTile(16, 4, 64, 4)),
        (70, 100, 3, WideTile(32, 8, 64, 5)),
    ],
)
def test_as_accurate_as_float32(
    tokens: int, hidden: int, total: int, tile: WideTile, device: torch.device, rng: torch.Generator
) -> None:
    """Depths that splits do not divide, and splits that get nothing, among them."""
    x = torch.randn(tokens, hidden, generator=rng).bfloat16()
    check(x, torch.randn(total, hidden, generator=rng), device, tile)


def test_as_accurate_in_the_tiles_that_are_chosen(device: torch.device, rng: torch.Generator) -> None:
    shapes = [(tokens, *shape) for tokens in (257, 512, 1000, 8192) for shape in ((2048, 64), (3072, 192), (6144, 768))]
    for tokens, hidden, total in shapes if device.type == "cuda" else [(257, 256, 40)]:
        check(torch.randn(tokens, hidden, generator=rng).bfloat16(), torch.randn(total, hidden, generator=rng), device)


def test_large_and_small_values(device: torch.device, rng: torch.Generator) -> None:
    """Columns of x, or of the weight, from 2⁻²⁰ to 2²⁰ large: activations have outliers."""
    x, weight = torch.randn(300, 512, generator=rng), torch.randn(48, 512, generator=rng)
    sizes = torch.exp2(torch.randint(-20, 21, (512,), generator=rng))
    check((x * sizes).bfloat16(), weight, device, TILE)
    check(x.bfloat16(), weight * sizes, device, TILE)


def test_every_bit_of_the_weight_counts(device: torch.device, rng: torch.Generator) -> None:
    """With one 1 in each row the logits are weights, exactly: the largest number, and those whose last bits BF16 can hold."""
    exponents = torch.randint(-100, 127, (64, 64), generator=rng)
    weight = torch.exp2(exponents) * (1 + torch.rand(64, 64, generator=rng)) * torch.randn(64, 64, generator=rng).sign()
    weight[5, 7] = torch.finfo(torch.float32).max
    rows = torch.eye(64).repeat(5, 1)[:257]
    logits = wide_router_logits(rows.bfloat16().to(device), weight.to(device), counters=new_counters(device), tile=TILE)
    assert torch.equal(logits.cpu(), weight.T.repeat(5, 1)[:257])


def test_rows_with_gaps_and_no_rows(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(260, 200, generator=rng).bfloat16()[:, 3:131]
    weight = torch.randn(20, 300, generator=rng)[:, 5:133]
    exact = F.linear(x.double(), weight.double())
    x, weight = (
        torch.empty(260, 200, device=device).bfloat16()[:, 3:131].copy_(x),
        torch.empty(20, 300, device=device)[:, 5:133].copy_(weight),
    )
    logits = wide_router_logits(x, weight, counters=new_counters(device), tile=TILE)
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=1e-5, atol=1e-4)
    assert wide_router_logits(x[:0], weight, counters=new_counters(device)).shape == (0, 20)


def test_repeated_on_the_same_counters(device: torch.device, rng: torch.Generator) -> None:
    """Sums of a tile's programs are added in their order, whoever is last: the same bits every time."""
    x, weight = torch.randn(300, 512, generator=rng).bfloat16().to(device), torch.randn(64, 512, generator=rng).to(device)
    counters = new_counters(device)
    tile = WideTile(64, 4, 64, 4)
    first = wide_router_logits(x, weight, counters=counters, tile=tile)
    assert torch.equal(wide_router_logits(x, weight, counters=counters, tile=tile), first)
    assert torch.equal(wide_router_logits(x[:70], weight, counters=counters, tile=tile), first[:70])


def test_without_counters_and_with_more_tiles_than_are_counted(device: torch.device, rng: torch.Generator) -> None:
    x, weight = torch.randn(40, 64, generator=rng).bfloat16(), torch.randn(9 * 64, 64, generator=rng)
    with recording() as launches:
        wide_router_logits(x, weight)
        wide_router_logits(x, weight, counters=new_counters(x.device), tile=WideTile(16, 2, 64, 2))
        wide_router_logits(
            torch.empty(16 * MOST_SPLIT_TILES, 64, dtype=torch.bfloat16), weight, counters=new_counters(x.device),
            tile=WideTile(16, 2, 64, 2),
        )  # fmt: skip
    assert [one.options["SPLITS"] for one in launches] == [1, 2, 1]
    exact = F.linear(x.double(), weight.double())
    logits = wide_router_logits(x.to(device), weight.to(device))
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=1e-5, atol=1e-4)


def test_tiles_fill_the_chip_twice_at_most() -> None:
    device = torch.device("meta")
    for tokens, total in ((257, 64), (512, 64), (1000, 64), (2048, 64), (8192, 64), (512, 192), (8192, 768), (257, 768)):
        tile = wide_tile(tokens, total, device)
        tiles = -(-total // 64) * -(-tokens // tile.tokens)
        assert tile.splits == 1 or tiles * tile.splits <= 2 * 132
        assert tiles * tile.splits >= 64


def test_ops_take_it_for_many_tokens_in_bf16(device: torch.device, rng: torch.Generator) -> None:
    ops, weight = TritonOps(), torch.randn(12, 64, generator=rng).to(device)
    packed = TritonOps().pack(weight.to("meta"), "float32")
    assert isinstance(packed, RouterWeight)
    router, tokens = RouterWeight(weight), moe_scores.MOST_TOKENS + 1
    for dtype, one, kernels in (
        (torch.bfloat16, router, ["_wide_scores_kernel"]),
        (torch.float16, router, []),
        (torch.float32, router, []),
        (torch.bfloat16, DenseWeight(weight), []),
    ):
        x = torch.randn(tokens, 64, generator=rng).to(device, dtype)
        with recording(run=True) as launches:
            logits = ops.router_logits(x, one)
        assert [launch.kernel.__name__ for launch in launches] == kernels
        torch.testing.assert_close(logits, PlainOps().router_logits(x, DenseWeight(weight)), rtol=1e-4, atol=1e-4)
