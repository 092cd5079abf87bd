"""What `fluent bench step` counts for our kernels: their launchers' own launches on the device "meta", against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fluentllm.bench.costs import EXPERTS, PRODUCTS, Cost, Load, distinct_experts, of_launch, of_product
from fluentllm.core.kv.formats import token_bytes
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.cuda.linear_cluster import ClusterTile
from fluentllm.kernels.moe import Routing
from fluentllm.kernels.triton.draw import draw
from fluentllm.kernels.triton.examples import experts_in_fp8, mixture_of_experts
from fluentllm.kernels.triton.held import held_tile
from fluentllm.kernels.triton.hopper_tiles import HopperTile
from fluentllm.kernels.triton.launch import recording
from fluentllm.kernels.triton.linear import linear
from fluentllm.kernels.triton.linear_tiles import LinearTile
from fluentllm.kernels.triton.mla_absorb import absorb
from fluentllm.kernels.triton.moe import experts, fp8_experts
from fluentllm.kernels.triton.ngram import ngram_gather
from fluentllm.kernels.triton.norm import draft_input

BF16, FP8, INT, LONG, FLOAT = torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64, torch.float32
LISTS = 8192
"""Bytes of lists of integers, at most: pairs in order, tiles. Nobody cares."""


@dataclass(frozen=True)
class Shape:
    """Of benchmarks/gpu/models, as a GPU has them: DeepSeek's shared experts lie with the others."""

    hidden: int
    inner: int
    heads: int
    routing: Routing
    distinct: dict[int, float]
    """Batch → experts that are read, by hand."""
    pairs: dict[int, float]
    """Batch → pairs of a token and an expert that computes something."""


SHAPES = {
    "deepseek-v3-lite": Shape(
        2048, 1408, 16, Routing(64, 6, scores="sigmoid", renormalise=True, shared=2),
        {1: 6 + 2, 32: 64 * (1 - (58 / 64) ** 32) + 2}, {1: 6 + 2, 32: 32 * (6 + 2)},
    ),
    # 12 choices among 192, of which 128 have weights
    "longcat-flash-lite": Shape(
        3072, 1024, 32, Routing(128, 12, zero_experts=64, scale=6.0), {1: 8, 32: 128 * (1 - (15 / 16) ** 32)}, {1: 8, 32: 256}
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(params=[1, 32])
def batch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def meta(*sides: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(sides, dtype=dtype, device="meta")


def load(shape: Shape, batch: int) -> Load:
    kv = KVSpec(kind="mla", layers=2, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128)
    spec = ModelSpec(
        architecture="A", vocab_size=9, hidden_size=shape.hidden, layers=2, heads=shape.heads, max_position=64, kv=kv
    )
    return Load(spec, batch, 1, 1000, token_bytes(kv, "bfloat16"), shape.routing)


def costs(call: Callable[[], object], load: Load) -> list[tuple[str, Cost]]:
    """(kernel, cost) of every launch."""
    with recording() as launches:
        call()
    return [(launch.kernel.__name__, of_launch(launch.kernel.__name__, launch.args, load)) for launch in launches]


def test_distinct_experts(shape: Shape, batch: int) -> None:
    assert distinct_experts(shape.routing, batch) == pytest.approx(shape.distinct[batch])
    assert distinct_experts(shape.routing, 0) == 0


def test_the_floors_experts_are_those_that_random_choices_touch(shape: Shape, batch: int) -> None:
    routing, rounds = shape.routing, 400
    chosen = torch.rand(rounds, batch, routing.total).topk(routing.top_k).indices
    touched = torch.zeros(rounds, routing.total).scatter_(1, chosen.flatten(1), 1.0)[:, : routing.experts].sum(1).mean()
    # One round's standard deviation is below 3 experts.
    assert touched.item() + routing.shared == pytest.approx(shape.distinct[batch], abs=1.0)


class TestExperts:
    def test_16_bits(self, shape: Shape, batch: int) -> None:
        hidden, inner, each = shape.hidden, shape.inner, shape.routing.each
        count = shape.routing.experts + shape.routing.shared
        gate_up, down = meta(count, 2 * inner, hidden), meta(count, hidden, inner)
        x, weights, ids = meta(batch, hidden), meta(batch, each, dtype=FLOAT), meta(batch, each, dtype=INT)
        launches = costs(lambda: experts(x, weights, ids, gate_up, down), load(shape, batch))
        first, second = [cost for name, cost in launches if name in EXPERTS]
        pairs, distinct = batch * each, shape.distinct[batch]
        assert first.flops == pytest.approx(2 * shape.pairs[batch] * 2 * inner * hidden)
        assert second.flops == pytest.approx(2 * shape.pairs[batch] * inner * hidden)
        # x and silu(gate) · up; the same and a row for each pair, or, for one token, each token's sum and what x adds to it.
        assert first.bytes == pytest.approx(2 * (distinct * 2 * inner * hidden + batch * hidden + pairs * inner), abs=LISTS)
        out = pairs if batch > 2 else 2 * batch
        assert second.bytes == pytest.approx(2 * (distinct * hidden * inner + pairs * inner + out * hidden), abs=LISTS)

    def test_fp8(self, shape: Shape, batch: int) -> None:
        """`_persistent_kernel`, whose matrices are flat for TMA."""
        hidden, inner, each = shape.hidden, shape.inner, shape.routing.each
        count = shape.routing.experts + shape.routing.shared
        gate_up = meta(count, 2 * inner, hidden, dtype=FP8), meta(count, 2 * inner // 128, hidden // 128, dtype=FLOAT)
        down = meta(count, hidden, inner, dtype=FP8), meta(count, hidden // 128, inner // 128, dtype=FLOAT)
        x, weights, ids = meta(batch, hidden), meta(batch, each, dtype=FLOAT), meta(batch, each, dtype=INT)
        launches = costs(lambda: fp8_experts(x, weights, ids, gate_up, down), load(shape, batch))
        first, second = [cost for name, cost in launches if name == "_persistent_kernel"]
        pairs, distinct = batch * each, shape.distinct[batch]
        assert first.flops == pytest.approx(2 * shape.pairs[batch] * 2 * inner * hidden)
        assert second.flops == pytest.approx(2 * shape.pairs[batch] * inner * hidden)
        # A byte a value, a float32 scale for 128 × 128 of a matrix and for 128 of a row; 16 bits leave.
        matrices = distinct * 2 * inner * hidden * (1 + 4 / 128**2)
        assert first.bytes == pytest.approx(matrices + pairs * (hidden + 4 * hidden / 128 + 2 * inner), abs=LISTS)
        matrices = distinct * inner * hidden * (1 + 4 / 128**2)
        assert second.bytes == pytest.approx(matrices + pairs * (inner + 4 * inner / 128 + 2 * hidden), abs=LISTS)

    @pytest.mark.parametrize(("rows", "needed", "tokens"), [(32, 1.0, 8), (32, 1.75, 14), (32, 4.0, 32), (8, 1.75, 8)])
    def test_rows_of_drafts_that_nobody_left_have_none(self, shape: Shape, rows: int, needed: float, tokens: int) -> None:
        """In a step that verifies three a sequence; a draft layer's pass of a row each has them all."""
        hidden, inner, routing = shape.hidden, shape.inner, shape.routing
        count = routing.experts + routing.shared
        gate_up, down = meta(count, 2 * inner, hidden), meta(count, hidden, inner)
        step = Load(load(shape, 8).spec, 8, 4, 1000, 1152, routing, needed)
        x, weights, ids = meta(rows, hidden), meta(rows, routing.each, dtype=FLOAT), meta(rows, routing.each, dtype=INT)
        first, _ = [cost for name, cost in costs(lambda: experts(x, weights, ids, gate_up, down), step) if name in EXPERTS]
        pairs = tokens * (routing.top_k * routing.experts / routing.total + routing.shared)
        assert first.flops == pytest.approx(2 * pairs * 2 * inner * hidden)
        beside = rows * hidden + rows * routing.each * inner
        read = 2 * (distinct_experts(routing, tokens) * 2 * inner * hidden + beside)
        assert first.bytes == pytest.approx(read, abs=LISTS)

    def test_no_kernel_of_theirs_is_forgotten(self) -> None:
        """Nothing else in these examples has an operand as large as the matrices of all experts."""
        with recording() as launches:
            experts_in_fp8()
            mixture_of_experts()
        least, found = 64 * 2048 * 1408, set()
        for launch in launches:
            operands = [getattr(value, "base", value) for value in launch.args]
            if any(isinstance(operand, torch.Tensor) and operand.numel() >= least for operand in operands):
                found.add(launch.kernel.__name__)
        assert found == set(EXPERTS)


TILES: dict[str, Any] = {
    "_linear_kernel": LinearTile(16, 32, 128, 1, 4),
    "_hopper_linear_kernel": HopperTile(32, 1, 4),
    "linear_cluster": ClusterTile(32, 4),
}
"""By the kernel that they belong to."""


class TestProducts:
    """Of gate and up of each model's dense layers, 10,944 and 6,144 rows each."""

    @pytest.mark.parametrize("kernel", TILES)
    def test_16_bits(self, shape: Shape, kernel: str) -> None:
        hidden, inner = shape.hidden, 10944 if shape.hidden == 2048 else 6144
        [(name, cost)] = costs(
            lambda: linear(meta(32, hidden), meta(2 * inner, hidden), gated=True, tile=TILES[kernel]), load(shape, 32)
        )
        assert name == kernel
        assert cost.bytes == 2 * (32 * hidden + 2 * inner * hidden + 32 * inner)
        assert cost.flops == 2 * 32 * hidden * 2 * inner

    @pytest.mark.parametrize("kernel", ["_hopper_linear_kernel", "linear_cluster"])
    def test_fp8(self, shape: Shape, kernel: str) -> None:
        """The output projection, with what is added to it."""
        hidden, depth = shape.hidden, shape.heads * 128
        scales = {"x_scale": meta(depth // 128, 32, dtype=FLOAT), "w_scale": meta(hidden // 128, depth // 128, dtype=FLOAT)}
        x, w, other = meta(32, depth, dtype=FP8), meta(hidden, depth, dtype=FP8), meta(32, hidden)
        [(name, cost)] = costs(lambda: linear(x, w, other=other, **scales, tile=TILES[kernel]), load(shape, 32))
        assert name == kernel
        read = 32 * depth + hidden * depth + 4 * (depth // 128 * 32 + hidden // 128 * (depth // 128))
        assert cost.bytes == read + 2 * 2 * 32 * hidden
        assert cost.flops == 2 * 32 * hidden * depth

    def test_held_weights(self, shape: Shape) -> None:
        hidden, inner = shape.hidden, 10944 if shape.hidden == 2048 else 6144
        tile = held_tile(1, inner, hidden, True)
        weight = meta(2 * inner, hidden)
        [(name, cost)] = costs(lambda: linear(meta(1, hidden), weight, gated=True, tile=tile), load(shape, 1))
        assert name == "_held_kernel"
        assert cost.bytes == 2 * (hidden + 2 * inner * hidden + inner)
        assert cost.flops == 2 * hidden * 2 * inner

    def test_rows_are_the_launchs_own(self, shape: Shape) -> None:
        """A draft pass has fewer than a step that verifies four a sequence."""
        whole = Load(load(shape, 8).spec, 8, 4, 1000, 1152, shape.routing)
        [(_, cost)] = costs(lambda: linear(meta(8, shape.hidden), meta(1024, shape.hidden)), whole)
        assert cost.flops == 2 * 8 * shape.hidden * 1024


def test_absorbed_queries_multiply_and_leave_the_cache_alone(shape: Shape, batch: int) -> None:
    """A pool of a million tokens, of which a token's row is written."""
    heads = shape.heads
    rope, kv, cache = meta(batch, 1, 64), meta(batch, 576), meta(1_000_000, 576)
    q, up_k = meta(batch, heads, 192), meta(heads, 128, 512)
    [(_, cost)] = costs(
        lambda: absorb(
            q, up_k, kv, meta(512), rope, rope, meta(batch, dtype=LONG), cache, eps=1e-6, latent_scale=1.0, interleaved=True
        ),
        load(shape, batch),
    )
    beside = 2 * (batch * (heads * (192 + 512 + 64) + 576 + 64) + 512) + 8 * batch
    assert cost.bytes == 2 * heads * 128 * 512 + beside
    assert cost.flops == 2 * batch * heads * 128 * 512


def test_tables_are_indexed_and_logits_are_read() -> None:
    shape = SHAPES["longcat-flash-lite"]
    tables, words = meta(10_000_000, 256), meta(131072, 3072)
    [(name, cost)] = costs(
        lambda: ngram_gather(
            *[meta(8, dtype=LONG)] * 3, meta(33, 8193, dtype=INT), meta(2, dtype=LONG), meta(4, 12, dtype=LONG),
            *[meta(12, dtype=LONG)] * 2, tables, words,
        ),
        load(shape, 8),
    )  # fmt: skip
    assert name == "_ngram_gather_kernel"
    assert cost.bytes < 2_000_000
    x, norms, longs = meta(8, 3072), (meta(3072), meta(3072)), [meta(8, dtype=LONG) for _ in range(2)]
    [(name, cost)] = costs(lambda: draft_input(*longs, words, x, *norms, 1e-5), load(shape, 8))
    assert name == "_draft_input_kernel"
    assert cost.bytes == 2 * (8 * 3072 + 2 * 3072 + 8 * 2 * 3072) + 2 * 8 * 8
    logits = meta(32, 131072, dtype=FLOAT)
    floats, ints = meta(33, 6, dtype=FLOAT), meta(33, 8, dtype=LONG)
    slots = meta(32, dtype=LONG)
    launches = dict(costs(lambda: draw(logits, slots, slots, floats[:, 0], ints[:, 6]), load(shape, 32)))
    assert logits.nbytes < launches["_draw_kernel"].bytes < 1.01 * logits.nbytes


class TestTorchs:
    def test_the_library_for_block_fp8_is_known(self) -> None:
        """By the name that the profiler gives it, with its shapes."""
        if not hasattr(F, "scaled_mm"):
            pytest.skip("this PyTorch has no scaled_mm")
        tokens, rows, depth = 32, 6144, 2048
        blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        q, w = meta(tokens, depth, dtype=FP8), meta(rows, depth, dtype=FP8)
        scale, w_scale = meta(depth // 128, tokens, dtype=FLOAT), meta(rows // 128, depth // 128, dtype=FLOAT)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            F.scaled_mm(q, w.t(), scale.t(), blocks[0], w_scale.t(), blocks[1], output_dtype=BF16)
        found = [of_product(event.name, event.input_shapes, 2) for event in profiler.events() if event.name in PRODUCTS]
        [cost] = [cost for cost in found if cost is not None]
        assert cost.bytes == tokens * depth + rows * depth + 2 * tokens * rows
        assert cost.flops == 2 * tokens * depth * rows

    @pytest.mark.parametrize("name", ["aten::_scaled_mm", "aten::_scaled_mm_v2"])
    def test_lists_of_scales_are_no_matrices(self, name: str) -> None:
        cost = of_product(name, [[32, 2048], [2048, 6144], [[32, 16], [32, 16]], [], [], [[16, 48]], [], [], []], 2)
        assert cost is not None
        assert cost.flops == 2 * 32 * 2048 * 6144
