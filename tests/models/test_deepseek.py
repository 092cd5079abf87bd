"""DeepSeek-V2, V2-Lite and V3 against Transformers: same checkpoint, same logits, however the rows are cut into passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from driver import Driver
from expert_oracle import copy_checkpoint, make_expert_oracle, state_of
from oracle import SCENARIOS, check, check_every_tensor_matters, load_ours
from transformers import DeepseekV2Config, DeepseekV3Config

from fluentllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
    "max_position_embeddings": 128,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
GROUPS = {"n_group": 4, "topk_group": 2}

CONFIGS = {
    "v2_lite": lambda: DeepseekV2Config(
        **{**SMALL, "q_lora_rank": None}, topk_method="greedy", rope_parameters=YARN, n_group=1, topk_group=1
    ),
    "v2": lambda: DeepseekV2Config(**SMALL, **GROUPS, topk_method="group_limited_greedy", rms_norm_eps=1e-3),
    "v3": lambda: DeepseekV3Config(**SMALL, **GROUPS, rope_parameters=YARN),
    "v3_other_ways": lambda: DeepseekV3Config(
        **{**SMALL, "q_lora_rank": None, "first_k_dense_replace": 0, "num_hidden_layers": 1},
        n_group=1,
        topk_group=1,
        rope_interleave=False,
        attention_bias=True,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_expert_oracle(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param), bias=0.05)


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_expert_oracle(CONFIGS["v3"](), tmp_path_factory.mktemp("v3"), bias=0.05)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree(oracle: Oracle, scenario: str) -> None:
    check(load_ours(oracle.folder), oracle, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree_in_fixed_order(oracle: Oracle, scenario: str) -> None:
    check(load_ours(oracle.folder, deterministic=True), oracle, scenario, deterministic=True)


def test_every_tensor_matters(oracle: Oracle) -> None:
    check_every_tensor_matters(oracle)


# ---------------------------------------------------------------------------------------------------- what is wrong with it
def test_missing_extra_and_misshapen_tensors_are_named(oracle: Oracle, tmp_path: Path) -> None:
    gone = "model.layers.0.self_attn.kv_b_proj.weight"
    change = {
        "model.layers.0.self_attn.kv_a_layernorm.weight": torch.ones(5),
        "model.layers.0.self_attn.rotten.weight": torch.ones(2, 3),
    }
    copy_checkpoint(oracle.folder, tmp_path, without={gone}, change=change)
    with pytest.raises(CheckpointError) as error:
        load_ours(tmp_path)
    for part in (f"{gone} [112, 24]", "kv_a_layernorm.weight [5] instead of [24]", "rotten.weight [2, 3]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method: 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: 2"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, "topk_group 1"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"n_routed_experts": "eight"}, "n_routed_experts is 'eight'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_refusals_name_the_field(v3: Oracle, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_ours(v3.folder, **changes)
    assert named in str(error.value)


# ------------------------------------------------------------------------------------------------------ precisions, formats
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_packed_weights_stay_near(oracle: Oracle, precision: str) -> None:
    """Of most tokens: a score that rounds the other way sends a token to another expert, and its logits far away."""
    model = load_ours(oracle.folder, precision=precision)
    tokens = oracle.tokens[0]
    ours, theirs = Driver(model, oracle.tokens).run([(0, 0, len(tokens))])[0], oracle.logits(tokens)
    errors = (ours - theirs).abs().amax(1) / theirs.abs().amax(1)
    assert 0 < errors.median() < 0.05


def test_block_fp8_checkpoint(v3: Oracle, tmp_path: Path) -> None:
    """The format of DeepSeek's own checkpoints: matrices float8 with a scale a tile; the rest as it is."""
    block = 16
    stored, dequantised = {}, {}
    for name, tensor in state_of(v3.folder).items():
        if tensor.dim() != 2 or "embed" in name or "head" in name or "gate.weight" in name:
            stored[name] = dequantised[name] = tensor
            continue
        rows, columns = (-(-side // block) for side in tensor.shape)
        scale = torch.rand(rows, columns) * 0.01 + 0.005
        wide = scale.repeat_interleave(block, 0)[: tensor.shape[0]].repeat_interleave(block, 1)[:, : tensor.shape[1]]
        stored[name] = (tensor / wide).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        dequantised[name] = stored[name].float() * wide
    quantization = {"quant_method": "fp8", "weight_block_size": [block, block]}
    copy_checkpoint(v3.folder, tmp_path, change=stored, quantization_config=quantization)
    (plain := tmp_path / "plain").mkdir()
    copy_checkpoint(v3.folder, plain, change=dequantised)
    chunks = [(s, 0, len(tokens)) for s, tokens in enumerate(v3.tokens)]
    ours, theirs = (Driver(load_ours(folder), v3.tokens).run(chunks) for folder in (tmp_path, plain))
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
