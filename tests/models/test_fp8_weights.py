"""Models whose matrices stay block FP8: a checkpoint's blocks, and matrices that are quantised as they are loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from driver import Driver
from expert_oracle import copy_checkpoint, make_expert_oracle, state_of
from oracle import load_ours
from test_deepseek import SMALL
from transformers import DeepseekV3Config

from fluentllm.core.protocols import BuildContext, PackedTensor
from fluentllm.kernels import choose_precision
from fluentllm.kernels.block_fp8 import dequantise_weight, quantise_weight
from fluentllm.kernels.fp8_weight import Fp8BlockWeight
from fluentllm.kernels.moe import Routing
from fluentllm.kernels.plain import PlainOps
from fluentllm.layers.linear import Linear
from fluentllm.layers.moe import Experts

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle

CPU = torch.device("cpu")
# q_a 256 rows and kv_a 40 stand in one matrix; gate and up have whole blocks; the dense layer's 200 rows each do not.
SHAPES = {
    "hidden_size": 256, "intermediate_size": 200, "moe_intermediate_size": 128, "q_lora_rank": 256, "kv_lora_rank": 32,
    "v_head_dim": 32,
}  # fmt: skip


def context(precision: str) -> BuildContext:
    return BuildContext(device=CPU, dtype=torch.float32, ops=PlainOps(), weight_precision=precision)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    config = DeepseekV3Config(**{**SMALL, **SHAPES}, n_group=1, topk_group=1)
    return make_expert_oracle(config, tmp_path_factory.mktemp("wide"), bias=0.05)


def test_a_checkpoint_stays_fp8(wide: Oracle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored, dequantised = {}, {}
    for name, tensor in state_of(wide.folder).items():
        if tensor.dim() != 2 or "embed" in name or "head" in name or "gate.weight" in name:
            continue
        # Scales that differ from block to block, so that a block with another's would show.
        rows = (0.5 + torch.rand(-(-tensor.shape[0] // 128))).repeat_interleave(128)[: tensor.shape[0], None]
        stored[name], stored[f"{name}_scale_inv"] = quantise_weight(tensor * rows)
        dequantised[name] = dequantise_weight(stored[name], stored[f"{name}_scale_inv"])
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    copy_checkpoint(wide.folder, tmp_path, change=stored, quantization_config=quantization)
    (plain := tmp_path / "plain").mkdir()
    copy_checkpoint(wide.folder, plain, change=dequantised)
    with caplog.at_level(logging.WARNING):
        model = load_ours(tmp_path, precision="fp8")
    assert "gate_proj, up_proj have [200, 200] rows" in caplog.text
    kept = {(m.out_features, m.in_features) for m in model.matrices() if isinstance(m, Fp8BlockWeight)}
    assert {(296, 256), (256, 200)} <= kept
    assert model.nbytes() < 0.5 * load_ours(plain).nbytes()
    chunks = [(s, 0, len(tokens)) for s, tokens in enumerate(wide.tokens)]
    ours, theirs = (torch.cat(Driver(m, wide.tokens).run(chunks)) for m in (model, load_ours(plain)))
    # What quantised activations cost. A token whose experts change is further off: hence the median.
    error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert error.median() < 0.2


def test_any_other_precision_dequantises(wide: Oracle, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    q, scale = quantise_weight(state_of(wide.folder)[name])
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    copy_checkpoint(wide.folder, tmp_path, change={name: q, f"{name}_scale_inv": scale}, quantization_config=quantization)
    (plain := tmp_path / "plain").mkdir()
    copy_checkpoint(wide.folder, plain, change={name: dequantise_weight(q, scale)})
    chunks = [(0, 0, len(wide.tokens[0]))]
    for precision in ("float32", "packed"):
        ours, theirs = (Driver(load_ours(f, precision=precision), wide.tokens).run(chunks) for f in (tmp_path, plain))
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("rows", [{"q": 256, "kv": 576}, {"a": 128, "b": 128, "c": 64}, {"only": 40}])
def test_parts_side_by_side_keep_their_scales(rows: dict[str, int]) -> None:
    linear = Linear(context("fp8"), "", 200, rows)
    parts = {name: quantise_weight(torch.randn(n, 200) * 3**i) for i, (name, n) in enumerate(rows.items())}
    for slot in reversed(list(linear.weight_slots())):
        q, scale = parts[slot.name.removesuffix(".weight")]
        assert slot.load_packed is not None
        assert slot.load_packed(PackedTensor("fp8_block", (q.shape[0], 200), {"q": q, "scale": scale}))
    assert isinstance(linear.weight, Fp8BlockWeight)
    assert torch.equal(linear.weight.dequantised(), torch.cat([dequantise_weight(*part) for part in parts.values()]))


def test_parts_that_would_share_a_block_are_quantised_anew() -> None:
    linear = Linear(context("fp8"), "layer.mlp", 128, {"gate": 72, "up": 72})
    parts = [quantise_weight(torch.randn(72, 128)) for _ in range(2)]
    for slot, (q, scale) in zip(linear.weight_slots(), parts, strict=True):
        assert slot.load_packed is not None
        assert slot.load_packed(PackedTensor("fp8_block", (72, 128), {"q": q, "scale": scale}))
    assert linear.weight is not None
    expected = torch.cat([dequantise_weight(*part) for part in parts])
    assert (linear.weight.dequantised() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("floats", [False, True])
def test_experts(floats: bool) -> None:
    experts = Experts(context("fp8"), "experts", Routing(3, 2), 256, 128)
    matrices = {}
    for slot in experts.weight_slots():
        q, scale = quantise_weight(torch.randn(slot.shape) * slot.shape[1] ** -0.5)
        matrices[slot.name] = dequantise_weight(q, scale)
        if floats:
            slot.load(matrices[slot.name])
        else:
            assert slot.load_packed is not None
            assert slot.load_packed(PackedTensor("fp8_block", slot.shape, {"q": q, "scale": scale}))
    x = torch.randn(5, 256)
    for number in range(3):
        gate, up, down = (matrices[f"experts.{number}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        assert (experts(number, x) - expected).norm() < 0.1 * expected.norm()
    # Quantising what is exactly representable changes nothing but rounding of the scales.
    assert experts.gate_up is not None
    assert experts.gate_up.dtype is torch.float8_e4m3fn


def test_experts_of_broken_blocks_are_kept_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    experts = Experts(context("fp8"), "experts", Routing(2, 1), 256, 96)
    assert "96 × 256 are not whole blocks" in caplog.text
    assert experts.gate_up is not None
    assert experts.gate_up.dtype is torch.float32
    assert all(slot.load_packed is None for slot in experts.weight_slots())


def test_choice_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    for capability, kept, asked in (((9, 0), "packed", "fp8"), ((8, 0), "bfloat16", "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: c)
        assert choose_precision("auto", gpu, bf16, False, fp8_checkpoint=True) == kept
        assert choose_precision("fp8", gpu, bf16, False) == asked
        assert choose_precision("auto", gpu, bf16, False) == "bfloat16"
        assert choose_precision("auto", gpu, torch.float16, False, fp8_checkpoint=True) == "float16"
        assert choose_precision("auto", gpu, bf16, True, fp8_checkpoint=True) == "bfloat16"
    assert choose_precision("auto", CPU, torch.float32, False, fp8_checkpoint=True) == "packed"
    assert choose_precision("fp8", CPU, torch.float32, False) == "fp8"
