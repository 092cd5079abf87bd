"""The persistent FP8 kernel of a layer's experts on a GPU, beside their definition on the dequantised operands."""

from __future__ import annotations

import pytest
import torch

from fluentllm.kernels.block_fp8 import E4M3, dequantise_rows, dequantise_weight, quantise_weight
from fluentllm.kernels.triton.fp8_quantise import quantise_rows
from fluentllm.kernels.triton.moe import fp8_experts
from fluentllm.kernels.triton.moe_pack import pack
from fluentllm.kernels.triton.moe_persistent import persistent, persistent_down, persistent_gate_up
from fluentllm.kernels.triton.moe_sort import sort_by_expert
from fluentllm.kernels.triton.moe_tiles import Tile

pytestmark = pytest.mark.gpu(capability=(9, 0))
DEVICE = torch.device("cuda")


def blocks(count: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [quantise_weight(torch.randn(rows, columns, device=DEVICE) * columns**-0.5) for _ in range(count)]
    return torch.stack([q.view(torch.uint8) for q, _ in pairs]).view(E4M3), torch.stack([scale for _, scale in pairs])


def routing(tokens: int, count: int, zero: int, top_k: int, *, liked: bool) -> torch.Tensor:
    """liked: expert 1 is everybody's, and the last one nobody's."""
    scores = torch.rand(tokens, count + zero, device=DEVICE)
    if liked:
        scores[:, 1], scores[:, count - 1] = 2, -1
    return scores.topk(top_k).indices.int()


def close(got: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    assert (got.float() - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "count", "zero", "top_k", "liked"),
    [
        (1, 2048, 1408, 64, 0, 6, False),
        (3, 128, 128, 2, 1, 2, False),
        (40, 384, 256, 9, 4, 3, True),
        (257, 3072, 1024, 128, 64, 12, True),
        (700, 256, 128, 5, 0, 2, True),
    ],
)
def test_products(
    tokens: int, hidden: int, inner: int, count: int, zero: int, top_k: int, liked: bool, rows: int
) -> None:  # fmt: skip
    torch.manual_seed(tokens + rows)
    gate_up, down = blocks(count, 2 * inner, hidden), blocks(count, hidden, inner)
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    ids = routing(tokens, count, zero, top_k, liked=liked)
    tiles = sort_by_expert(ids, count, rows)
    q, scale = pack(x, tiles, top_k)
    h = persistent_gate_up(q, scale, *gate_up, tiles)
    h_q, h_scale = quantise_rows(h)
    y = persistent_down(h_q, h_scale, *down, tiles)
    again = persistent_down(h_q, h_scale, *down, tiles)
    computed, offsets = int(tiles.offsets[-1]), tiles.offsets.tolist()
    packed, hidden_rows = dequantise_rows(q, scale), dequantise_rows(h_q, h_scale)
    expected_h = torch.empty(computed, inner, device=DEVICE)
    expected = torch.empty(computed, hidden, device=DEVICE)
    for expert in range(count):
        at = slice(offsets[expert], offsets[expert + 1])
        first, second = (dequantise_weight(part[0][expert], part[1][expert]) for part in (gate_up, down))
        gate, up = (packed[at] @ first.T).bfloat16().float().chunk(2, 1)
        expected_h[at] = torch.nn.functional.silu(gate) * up
        expected[at] = hidden_rows[at] @ second.T
    order = tiles.order[:computed].long()
    close(h[:computed], expected_h, 3e-3)
    close(y[order], expected, 3e-3)
    assert torch.equal(y[order], again[order])


def test_the_layer_agrees_with_the_other_kernel() -> None:
    assert persistent(DEVICE)
    torch.manual_seed(0)
    hidden, inner, count, top_k = 2048, 1408, 64, 6
    gate_up, down = blocks(count, 2 * inner, hidden), blocks(count, hidden, inner)
    for tokens in (1, 33, 500):
        x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
        weights, ids = torch.rand(tokens, top_k, device=DEVICE), routing(tokens, count, 8, top_k, liked=False)
        streamed = fp8_experts(x, weights, ids, gate_up, down, x, tile=Tile(16, 128, 128, 4, 5, swapped=True))
        ours = fp8_experts(x, weights, ids, gate_up, down, x)
        assert isinstance(streamed, torch.Tensor)
        assert isinstance(ours, torch.Tensor)
        close(ours, streamed.float(), 2e-2)
