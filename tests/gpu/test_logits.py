"""Logits of every model family by every attention backend, against the same weights on the CPU in float64.

How far BF16 may be off is measured: the same model in BF16 on the CPU is the measure, and a GPU may be off twice as far. Where
experts are chosen, rounding now and then chooses others, on a CPU as on a GPU; so rows are compared by quantiles, and each
family's smallest error is far below what a wrong row would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.families import FAMILIES, Family, errors, float64_weights
from torch import Tensor

from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import AttentionSpec


def check(found: Tensor, measure: Tensor) -> None:
    """`found` and `measure`: errors of rows, of what is tested and of BF16 on the CPU."""
    for share in (0.1, 0.5, 0.9):
        ours, allowed = found.quantile(share).item(), 2 * measure.quantile(share).item()
        assert ours <= allowed, f"the {share} quantile of the rows' errors is {ours:.2e}; BF16 explains {allowed:.2e}"
    assert found.max() <= max(2 * measure.max().item(), 0.5), f"a row is wrong: {found.max():.2e}"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(the family, its exact logits, errors of BF16 on the CPU)."""
    cpu = torch.device("cpu")
    with float64_weights():
        found = Family(request.param, tmp_path_factory.mktemp(request.param))
        exact = found.logits(cpu, torch.float64)
        measure = errors(found.logits(cpu, torch.bfloat16), exact)
        print(f"{request.param}: BF16 on the CPU is off by {measure.median():.2e}, most {measure.max():.2e}")
        yield found, exact, measure


@pytest.mark.parametrize("deterministic", [False, True], ids=["plain", "deterministic"])
def test_logits_are_the_float64_ones_as_far_as_bf16_goes(family: Any, deterministic: bool) -> None:
    found, exact, measure = family
    device = torch.device("cuda", 0)
    registry = PluginManager.load({"engine", "executor"}, allow=[], deny=[]).registry("attention")
    spec = AttentionSpec(
        model=found.spec, device="cuda", dtype="bfloat16", kv_dtype="bfloat16", page_size=64, deterministic=deterministic
    )
    # FlashInfer's kernels may not be compiled yet: tests/gpu/test_flashinfer.py waits for them.
    entries = [entry for entry in registry.supported(spec) if entry.name != "flashinfer"]
    assert "triton" in {entry.name for entry in entries}, registry.why_not(spec)
    for entry in entries:
        off = errors(found.logits(device, torch.bfloat16, entry.factory, deterministic=deterministic), exact)
        print(f"{entry.name}: off by {off.median():.2e}, most {off.max():.2e}")
        check(off, measure)
