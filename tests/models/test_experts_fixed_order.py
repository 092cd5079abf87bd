"""Deterministic mode for models with experts: the same bits whatever the batch, the chunks and the kind of pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from driver import Driver
from expert_oracle import make_expert_oracle
from oracle import SCENARIOS, load_ours
from test_deepseek import CONFIGS as DEEPSEEK
from test_longcat import BIAS, CONFIGS as LONGCAT

from fluentllm.core.protocols import BuildContext
from fluentllm.kernels import choose_ops
from fluentllm.kernels.moe import Routing
from fluentllm.layers.moe import SparseMoE

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.mark.parametrize(("family", "kind"), [(DEEPSEEK, "v2_lite"), (DEEPSEEK, "v3"), (LONGCAT, "lite")])
def test_logits_do_not_depend_on_how_rows_are_cut_into_passes(family: dict, kind: str, tmp_path: Path) -> None:
    oracle = make_expert_oracle(family[kind](), tmp_path, BIAS)
    model = load_ours(tmp_path, deterministic=True)
    lengths = [len(tokens) for tokens in oracle.tokens]
    expected = SCENARIOS["prefill"](Driver(model, oracle.tokens, deterministic=True), lengths)
    for name, scenario in SCENARIOS.items():
        out = scenario(Driver(model, oracle.tokens, deterministic=True, seed=1), lengths)
        for ours, alone in zip(out, expected, strict=True):
            assert torch.equal(ours, alone), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_row_of_the_block_does_not_depend_on_its_batch(precision: str) -> None:
    """From 1 to 64 rows, each bit for bit what it is alone."""
    context = BuildContext(CPU, torch.float32, choose_ops(CPU, True), weight_precision=precision)
    routing = Routing(experts=8, zero_experts=3, top_k=3, scores="sigmoid", renormalise=True, scale=1.3)
    block = SparseMoE(context, "mlp", routing, 64, 48, bias="gate.bias", shared_inner=32)
    for slot in block.weight_slots():
        if not slot.unused:
            slot.load(torch.randn(slot.shape) / 8)
    block.finalize()
    x = torch.randn(64, 64)
    alone = torch.cat([block(row.unsqueeze(0)) for row in x])
    for rows in (0, 1, 2, 7, 8, 9, 33, 64):
        chosen = torch.randperm(64)[:rows]
        assert torch.equal(block(x[chosen]), alone[chosen])
