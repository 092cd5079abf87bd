"""Linear, embedding and head as the loader sees them: parts by their names, floats and blocks, in any order."""

from __future__ import annotations

import itertools

import pytest
import torch

from fluentllm.core.protocols import BuildContext, PackedTensor
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.weights import Int4Weight
from fluentllm.layers.embedding import Embedding, Head
from fluentllm.layers.linear import Linear
from fluentllm.layers.module import Module


def context(precision: str = "float32") -> BuildContext:
    return BuildContext(device=torch.device("cpu"), dtype=torch.float32, ops=PlainOps(), weight_precision=precision)


def blocks(rows: int, columns: int) -> PackedTensor:
    parts = {"q": torch.randint(0, 16, (rows, columns), dtype=torch.uint8)}
    parts |= {name: torch.rand(rows, columns // 32) / 10 for name in ("d", "m")}
    return PackedTensor("q4_1", (rows, columns), parts)


def values(packed: PackedTensor) -> torch.Tensor:
    q, d, m = (packed.parts[name] for name in "qdm")
    return (q.unflatten(1, (-1, 32)) * d.unsqueeze(-1) + m.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("order", list(itertools.permutations(["q_proj", "k_proj", "v_proj"])))
def test_parts_come_in_any_order(order: tuple[str, ...]) -> None:
    linear = Linear(context(), "layer.attn", 32, {"q_proj": 8, "k_proj": 4, "v_proj": 4}, bias=True)
    slots = {slot.name: slot for slot in linear.weight_slots()}
    tensors = {name: torch.randn(slot.shape) for name, slot in slots.items()}
    for part in order:
        for kind in ("bias", "weight"):
            name = f"layer.attn.{part}.{kind}"
            slots[name].load(tensors[name].double())
    x = torch.randn(5, 32)
    for part, found in zip(linear.parts, linear.split(linear(x)), strict=True):
        expected = x @ tensors[f"layer.attn.{part}.weight"].T + tensors[f"layer.attn.{part}.bias"]
        torch.testing.assert_close(found, expected)


def test_blocks_are_taken_as_they_are() -> None:
    linear = Linear(context("packed"), "", 64, {"gate": 32, "up": 16})
    packed = {"gate": blocks(32, 64), "up": blocks(16, 64)}
    for slot in linear.weight_slots():
        assert slot.load_packed is not None
        assert slot.load_packed(packed[slot.name.removesuffix(".weight")])
    assert isinstance(linear.weight, Int4Weight)
    x = torch.randn(2, 64)
    expected = x @ torch.cat([values(packed["gate"]), values(packed["up"])]).T
    assert (linear(x) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_blocks_beside_floats_become_floats() -> None:
    linear = Linear(context("packed"), "", 64, {"gate": 32, "up": 16})
    gate, up = linear.weight_slots()
    packed, floats = blocks(32, 64), torch.randn(16, 64)
    assert gate.load_packed is not None
    assert gate.load_packed(packed)
    up.load(floats)
    x = torch.randn(2, 64)
    expected = x @ torch.cat([values(packed), floats]).T
    assert (linear(x) - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_exact_precisions_take_no_blocks() -> None:
    [slot] = Linear(context("float32"), "", 64, {"down": 32}).weight_slots()
    assert slot.load_packed is None


def test_a_tied_head_is_filled_from_the_embeddings_tensor() -> None:
    class Tied(Module):
        def __init__(self) -> None:
            self.embedding = Embedding(context(), "embed", 50, 32)
            self.head = Head(context(), "embed", 50, 32)

    model, table = Tied(), torch.randn(50, 32)
    slots = list(model.weight_slots())
    assert [slot.name for slot in slots] == ["embed.weight"] * 2
    for slot in slots:
        slot.load(table)
    tokens = torch.tensor([3, 49, 0])
    assert torch.equal(model.embedding(tokens), table[tokens])
    logits = model.head(table[tokens])
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, table[tokens] @ table.T)


def test_modules_are_found_once_and_finalised_children_first() -> None:
    seen: list[str] = []

    class Named(Module):
        def __init__(self, name: str, *children: Module) -> None:
            self.name, self.items, self.table = name, list(children), {"a": children[0]} if children else {}

        def own_finalize(self) -> None:
            seen.append(self.name)

    leaf = Named("leaf")
    Named("root", Named("middle", leaf), leaf).finalize()
    assert sorted(seen) == ["leaf", "middle", "root"]
    assert seen.index("root") == 2
