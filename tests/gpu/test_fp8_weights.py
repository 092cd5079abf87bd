"""Whole engines with weights in block FP8: steps of one or two tokens, of more, and prefill take kernels of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluentllm.kernels.fp8_weight import fp8_products
from fluentllm.kernels.triton import moe, streamed_weight

from .models import engine, small
from .test_captured_steps import TEMPERATURES, run

FP8 = {"model.weight_precision": "fp8"}


@pytest.mark.parametrize("name", ["deepseek-v3-lite", "longcat-flash-lite"])
def test_captured_programs_give_the_tokens_of_eager_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if not fp8_products(torch.device("cuda")):
        pytest.skip("needs FP8 matrix units (sm_90 or later)")
    called: set[str] = set()

    def watch(module: object, function: str) -> None:
        real = getattr(module, function)

        def watched(*args: object, **options: object) -> object:
            called.add(function)
            return real(*args, **options)

        monkeypatch.setattr(module, function, watched)

    watch(moe, "persistent_gate_up")
    watch(streamed_weight, "library_product")
    folder = small(name, tmp_path)
    with engine(folder, **FP8, **{"engine.cuda_graphs": False, "engine.overlap_depth": 0}) as local:
        expected = [run(local, temperature) for temperature in TEMPERATURES]
    assert {"persistent_gate_up", "library_product"} <= called
    for depth in (0, 2):
        with engine(folder, **FP8, **{"engine.overlap_depth": depth}) as local:
            assert [run(local, temperature) for temperature in TEMPERATURES] == expected, depth
            assert len(local.engine.executor.programs._graphs), "nothing was captured"
