"""What a model holds, and how many bytes that is, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.hub import resolve
from fluentllm.kernels.copies import COPIES
from fluentllm.kernels.weights import DenseWeight
from fluentllm.layers.module import Module


def nano(precision: str) -> Harness:
    given = {"model.load_format": "auto", "model.dtype": "float32", "model.weight_precision": precision}
    return Harness(resolve("longcat-nano").path, **given)


ATTENTION = (32 + 576) * 128 + 8 * 96 * 32 + 128 * 256
EXPERT = 3 * 64 * 128
MATRICES = 2 * ATTENTION + 2 * 3 * 128 * 256
"""Of a layer of longcat-nano, which has eight experts with weights, besides them."""
OTHERS = 2 * (2 * 8 * 32 * 512 + 32 + 512 + 2 * 128) + 12 * 128 + 12
"""Not packed: matrices of keys and values, norms; the router, whose bias is one of 12."""


def mtp(model: Any) -> int:
    """Bytes of the draft layer, whose embedding and head are the model's."""
    shared = {id(model.embedding), id(model.head)}
    return sum(Own(module).nbytes() for module in model.mtp.modules() if id(module) not in shared)


class Own(Module):
    """What a module holds itself, without those below."""

    def __init__(self, module: Module) -> None:
        vars(self).update({name: value for name, value in vars(module).items() if not isinstance(value, Module)})


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2)])
def test_longcat_nano_by_hand(precision: str, width: int) -> None:
    """The router once, though it is kept as a tensor and as a matrix in the same memory; the embedding, and the head's copy."""
    harness = nano(precision)
    model: Any = harness.loaded.model
    layers = 2 * (width * (MATRICES + 8 * EXPERT) + 4 * OTHERS)
    assert model.nbytes() - mtp(model) == layers + (4 + width) * 8192 * 128 + 4 * 128
    assert harness.loaded.weight_bytes == model.nbytes()


def test_experts_that_are_packed_one_by_one_count() -> None:
    """In int8, on a CPU: no tensor holds them all. A byte a value, and scales."""
    model: Any = nano("int8").loaded.model
    COPIES.wait()
    bare = 8 * EXPERT
    for layer in model.layers:
        experts = layer.moe.experts
        assert experts.gate_up is None
        assert bare < experts.nbytes() < 4 * bare  # with copies for many rows, in 16 bits
        matrices = [layer.moe.router, experts]
        assert layer.moe.nbytes() == sum(part.nbytes() for part in matrices)


def test_what_is_kept_in_two_places_counts_once() -> None:
    class Model(Module):
        def __init__(self) -> None:
            self.table = torch.zeros(6, 4)
            self.views = [DenseWeight(self.table[:3]), DenseWeight(self.table[3:])]
            self.again = {"first": self.views[0], "norm": torch.zeros(5)}

    model = Model()
    assert model.nbytes() == 4 * (6 * 4 + 5)
    assert model.matrices() == model.views


def test_matrices_are_those_of_every_row() -> None:
    """Those of experts are held too, and not among them: a step multiplies few rows with some of them."""
    model: Any = nano("float32").loaded.model
    matrices = {id(matrix) for matrix in model.matrices()}
    assert id(model.head.weight) in matrices
    for layer in model.layers:
        assert not matrices & {id(weight) for weight in layer.moe.experts._weights.values()}
        assert id(layer.moe.router._packed) in matrices


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a layout of that library")
def test_a_layout_that_shows_no_memory_counts_too() -> None:
    class Holding(Module):
        def __init__(self) -> None:
            self.weight = DenseWeight(torch.zeros(4, 8).to_mkldnn())
            self.loose = torch.zeros(16).to_mkldnn()
            self.again = self.loose

    assert Holding().nbytes() == 4 * (4 * 8 + 16)
