"""What a model in block FP8 asks of `TritonOps`, beside the plain operations on the same matrices."""

from __future__ import annotations

import pytest
import torch

from fluentllm.core.protocols import BuildContext
from fluentllm.kernels.block_fp8 import E4M3, LARGEST, quantise_weight
from fluentllm.kernels.moe import Routing
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.kernels.triton.streamed_weight import StreamedFp8Weight
from fluentllm.kernels.weights import DenseWeight
from fluentllm.layers.moe import Experts


def assert_near(ours: torch.Tensor, plain: torch.Tensor, error: float) -> None:
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    ours, plain = ours.float().cpu(), plain.float().cpu()
    assert (ours - plain).norm() <= error * plain.norm().clamp_min(1e-9)


@pytest.mark.parametrize("tokens", [0, 2, 3, 65])
@pytest.mark.parametrize(("rows", "columns"), [(200, 144), (136, 256)])
def test_products(tokens: int, rows: int, columns: int, device: torch.device, rng: torch.Generator) -> None:
    # Values that E4M3 has, and the largest one in each group: quantising changes nothing, so the interpreter's cast, which
    # loses a carry now and then, does no harm.
    x = (torch.randn(tokens, columns + 16, generator=rng) * 50).to(E4M3).to(torch.bfloat16).to(device)[:, 16:]
    x[:, ::128] = LARGEST
    q, scale = (t.to(device) for t in quantise_weight(torch.randn(rows, columns, generator=rng) * 1e-3))
    bias = torch.randn(rows, generator=rng).to(torch.bfloat16).to(device)
    plain, ours = (ops.pack_blocks("fp8_block", {"q": q, "scale": scale}, "fp8") for ops in (PlainOps(), TritonOps()))
    assert plain is not None
    assert isinstance(ours, StreamedFp8Weight)
    assert_near(ours.product(x, bias), plain.product(x, bias), 1e-2)
    assert_near(TritonOps().gated_linear(x, ours), PlainOps().gated_linear(x, plain), 2e-2)


def test_columns_that_tma_cannot_read_are_dequantised(device: torch.device, rng: torch.Generator) -> None:
    weight = torch.randn(40, 72, generator=rng).to(device)
    packed = TritonOps().pack(weight, "fp8")
    assert isinstance(packed, DenseWeight)
    assert (packed.dequantised() - weight).norm() < 0.05 * weight.norm()


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_experts(tokens: int, device: torch.device, rng: torch.Generator) -> None:
    routing = Routing(4, 2, zero_experts=1)
    context = BuildContext(device=device, dtype=torch.bfloat16, ops=TritonOps(), weight_precision="fp8")
    experts = Experts(context, "", routing, 256, 128)
    for slot in experts.weight_slots():
        if not slot.unused:
            slot.load(torch.randn(slot.shape, generator=rng) * slot.shape[1] ** -0.5)
    x, shared = (torch.randn(tokens, 256, generator=rng).to(torch.bfloat16).to(device) for _ in range(2))
    weights = torch.rand(tokens, 2, generator=rng).to(device)
    ids = torch.randint(0, 5, (tokens, 2), generator=rng, dtype=torch.int32).to(device)
    plain, ours = (
        ops.experts(x, weights, chosen, experts, routing, shared)
        for ops, chosen in ((PlainOps(), ids.long()), (TritonOps(), ids))
    )
    assert_near(ours, plain, 0.15 if device.type == "cpu" else 0.02)
