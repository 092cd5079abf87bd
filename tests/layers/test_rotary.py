"""Rotary against the rotation written out pair by pair, and configs that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fluentllm.core.errors import CheckpointError
from fluentllm.core.protocols import BuildContext
from fluentllm.kernels.fixed_order import FixedOrderOps
from fluentllm.kernels.plain import PlainOps
from fluentllm.layers.rotary import Rotary, rope_parameters

CONFIG: dict[str, Any] = {"max_position_embeddings": 64, "rope_theta": 500.0}


@pytest.mark.parametrize("ops", [PlainOps(), FixedOrderOps()])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 12])
def test_each_pair_turns_by_its_angle(ops: PlainOps, interleaved: bool, width: int) -> None:
    """Heads of 12 values, of which the first 8 rotate, or of 8."""
    ctx = BuildContext(device=torch.device("cpu"), dtype=torch.float32, ops=ops, max_positions=64)
    rotary = Rotary(ctx, CONFIG, 8, 64, interleaved=interleaved)
    positions = torch.tensor([0, 5, 63, 5])
    x = torch.randn(4, 3, width)
    found = rotary(x, rotary.rows(positions))
    expected = x.double().clone()
    for row, position in enumerate(positions.tolist()):
        for i in range(4):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
            angle = position * 500.0 ** (-2 * i / 8)
            a, b = x[row, :, first].double(), x[row, :, second].double()
            expected[row, :, first] = a * math.cos(angle) - b * math.sin(angle)
            expected[row, :, second] = b * math.cos(angle) + a * math.sin(angle)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_both_spellings_of_a_config_mean_the_same() -> None:
    scaling = {"factor": 2.0, "rope_theta": 500.0, "rope_type": "linear"}
    new = rope_parameters({"max_position_embeddings": 64, "rope_parameters": scaling})
    old = rope_parameters({**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert new == old


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"type": "su", "factor": 2.0}, "su"),
        ({"rope_type": "default", "mrope_section": [1, 2, 3]}, "mrope"),
        ({"full_attention": {"rope_type": "default"}}, "each kind of layer"),
    ],
)
def test_unknown_scalings_are_refused_by_name(scaling: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        rope_parameters({**CONFIG, "rope_scaling": scaling})


def test_a_scaling_without_its_number_is_refused() -> None:
    ctx = BuildContext(device=torch.device("cpu"), dtype=torch.float32, ops=PlainOps())
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        Rotary(ctx, {**CONFIG, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 8, 64)
