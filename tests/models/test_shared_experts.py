"""Shared experts computed as routed ones that every token has, beside a block of their own."""

from __future__ import annotations

import pytest
import torch

from fluentllm.core.protocols import BuildContext, PackedTensor
from fluentllm.kernels.block_fp8 import dequantise_weight, quantise_weight
from fluentllm.kernels.moe import LiveRows, Routing
from fluentllm.kernels.plain import PlainOps
from fluentllm.layers.moe import SparseMoE

HIDDEN, INNER, SHARED = 256, 128, 2
ROUTING = Routing(experts=6, top_k=3, scores="sigmoid", renormalise=True, scale=2.5)


class JoiningOps(PlainOps):
    joins_shared_experts = True


def block(ops: PlainOps, precision: str, shared: int = SHARED, routing: Routing = ROUTING) -> SparseMoE:
    context = BuildContext(device=torch.device("cpu"), dtype=torch.float32, ops=ops, weight_precision=precision)
    return SparseMoE(context, "mlp", routing, HIDDEN, INNER, bias="gate.bias", shared_inner=shared * INNER)


def load(made: SparseMoE, tensors: dict[str, torch.Tensor], *, packed: bool) -> None:
    slots = {slot.name: slot for module in made.modules() for slot in module.own_slots()}
    assert set(slots) == set(tensors)
    for name, slot in slots.items():
        assert slot.shape == tuple(tensors[name].shape), name
        if packed and slot.load_packed is not None:
            q, scale = quantise_weight(tensors[name])
            assert slot.load_packed(PackedTensor("fp8_block", slot.shape, {"q": q, "scale": scale}))
        else:
            slot.load(tensors[name])
    made.finalize()


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize(("precision", "packed"), [("float32", False), ("fp8", False), ("fp8", True)])
def test_joined_is_apart(tokens: int, precision: str, packed: bool) -> None:
    apart, joined = block(PlainOps(), precision), block(JoiningOps(), precision)
    assert joined.shared is None
    assert joined.routing.each == ROUTING.top_k + SHARED
    names = {slot.name: slot.shape for module in apart.modules() for slot in module.own_slots()}
    # Values that block FP8 keeps as they are, so that both quantise to the same.
    tensors = {
        name: dequantise_weight(*quantise_weight(torch.randn(shape) * shape[-1] ** -0.5))
        if len(shape) == 2
        else torch.randn(shape)
        for name, shape in names.items()
    }
    for made in (apart, joined):
        load(made, tensors, packed=packed)
    x = torch.randn(tokens, HIDDEN)
    live = LiveRows(torch.randint(0, 2, (tokens,)) * 16, 16)
    # Rows that nobody needs have no experts, shared ones neither where these are among them.
    assert not joined(x, live)[live.inert()].any()
    assert apart.shared is not None
    assert torch.equal(apart(x, live)[live.inert()], apart.shared(x)[live.inert()])
    torch.testing.assert_close(joined(x, live)[~live.inert()], joined(x)[~live.inert()])
    expected, found = apart(x), joined(x)
    # In FP8 a shared block's inner values are quantised in the same runs of 128, its sums rounded at one more place.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max()) if tokens else 0.0))


@pytest.mark.parametrize(
    ("precision", "inner", "routing"),
    [("int8", INNER, ROUTING), ("float32", 100, ROUTING), ("float32", INNER, Routing(experts=6, top_k=3, zero_experts=2))],
)
def test_what_cannot_be_joined_stays_apart(precision: str, inner: int, routing: Routing) -> None:
    context = BuildContext(device=torch.device("cpu"), dtype=torch.float32, ops=JoiningOps(), weight_precision=precision)
    made = SparseMoE(context, "mlp", routing, HIDDEN, INNER, shared_inner=inner)
    assert made.shared is not None
    assert made.routing.shared == 0
