"""LongCat-Flash against Transformers, its MTP layer and Flash-Lite's n-gram embedding against the plain formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from expert_oracle import (
    DRAFTING,
    add_tensors,
    copy_checkpoint,
    draft_error,
    make_expert_oracle,
    state_of,
    target_hidden,
)
from oracle import SCENARIOS, TOLERANCE, check, error_of, load_ours, tensor_names
from references.plain import MLAShape, longcat_mtp
from transformers import LongcatFlashConfig

from fluentllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle
    from torch import Tensor

HIDDEN, VOCAB, EXPERTS = 64, 96, 8
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_layers": 1,
    "num_attention_heads": 4,
    "ffn_hidden_size": 80,
    "expert_ffn_hidden_size": 24,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    "moe_topk": 4,
    "n_routed_experts": EXPERTS,
    "zero_expert_num": 4,
    "routed_scaling_factor": 2.0,
    "max_position_embeddings": 128,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 5e6,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIGS = {
    "flash": lambda: LongcatFlashConfig(**{**SMALL, "num_layers": 2}),
    "lite": lambda: LongcatFlashConfig(**SMALL, rope_parameters=YARN),
    "other_ways": lambda: LongcatFlashConfig(**SMALL, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3),
}
BIAS = 0.02
LAYER = "model.mtp.layers.0"


@pytest.fixture(scope="module", params=CONFIGS)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_expert_oracle(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param), BIAS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree(oracle: Oracle, scenario: str) -> None:
    check(load_ours(oracle.folder), oracle, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree_in_fixed_order(oracle: Oracle, scenario: str) -> None:
    check(load_ours(oracle.folder, deterministic=True), oracle, scenario, deterministic=True)


def test_every_tensor_matters_but_those_of_zero_experts(oracle: Oracle) -> None:
    """Transformers saves gate and up matrices for zero experts, and computes nothing with them."""
    unused = {f"mlp.experts.{EXPERTS + z}." for z in range(4)}
    for name in tensor_names(oracle.folder):
        error = error_of(load_ours(oracle.folder, perturb=name), oracle, "prefill")
        if any(part in name for part in unused):
            assert error <= TOLERANCE, name
        else:
            assert error > TOLERANCE, name


def test_zero_experts_matrices_may_be_missing(oracle: Oracle, tmp_path: Path) -> None:
    unused = [n for n in tensor_names(oracle.folder) if any(f"mlp.experts.{EXPERTS + z}." in n for z in range(4))]
    assert unused
    copy_checkpoint(oracle.folder, tmp_path, without=unused)
    check(load_ours(tmp_path), oracle, "prefill")


# ------------------------------------------------------------------------------------------------------------------- MTP
@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, list[Tensor]]:
    """A checkpoint with an MTP layer, and what the plain reference makes of the three sequences."""
    oracle = make_expert_oracle(CONFIGS["lite"](), tmp_path_factory.mktemp("mtp"), BIAS)
    attention = {
        name.replace("model.layers.0.self_attn.0", f"{LAYER}.self_attn"): tuple(tensor.shape)
        for name, tensor in state_of(oracle.folder).items()
        if name.startswith("model.layers.0.self_attn.0.")
    }
    norms = [f"{LAYER}.{n}" for n in ("enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm")]
    mlp = f"{LAYER}.transformer_layer.mlp"
    state = add_tensors(
        oracle.folder,
        {
            **attention,
            **{f"{name}.weight": (HIDDEN,) for name in [*norms, "model.mtp.norm"]},
            **{f"{mlp}.{name}.weight": (80, HIDDEN) for name in ("gate_proj", "up_proj")},
            f"{mlp}.down_proj.weight": (HIDDEN, 80),
            f"{LAYER}.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
            "model.mtp.embed_tokens.weight": (VOCAB, HIDDEN),
        },
    )
    shape = mla_shape(oracle)
    expected = [longcat_mtp(state, tokens, target_hidden(oracle, tokens), shape, 1e-5) for tokens in oracle.tokens]
    return oracle, expected


def mla_shape(oracle: Oracle) -> MLAShape:
    rotary, attention = oracle.model.model.rotary_emb, oracle.model.model.layers[0].self_attn[0]
    return MLAShape(
        heads=4,
        nope=16,
        rope=8,
        value=12,
        frequencies=rotary.inv_freq,
        rotary_scale=rotary.attention_scaling,
        softmax_scale=attention.scaling,
        query_scale=(HIDDEN / 20) ** 0.5,
        latent_scale=(HIDDEN / 24) ** 0.5,
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("way", DRAFTING)
def test_mtp_agrees_with_the_formula(drafting: tuple[Oracle, list[Tensor]], way: str, deterministic: bool) -> None:
    oracle, expected = drafting
    model = load_ours(oracle.folder, deterministic=deterministic)
    assert model.mtp.kv_layer == model.spec.kv.layers == 2
    assert draft_error(model, oracle, expected, way, deterministic=deterministic) <= TOLERANCE


def test_every_tensor_of_the_mtp_layer_matters(drafting: tuple[Oracle, list[Tensor]]) -> None:
    oracle, expected = drafting
    names = [name for name in state_of(oracle.folder) if name.startswith("model.mtp.")]
    assert len(names) == 17
    for name in names:
        model = load_ours(oracle.folder, perturb=name)
        assert draft_error(model, oracle, expected, "prefill") > TOLERANCE, name
        check(model, oracle, "prefill")


def test_mtp_drafts_through_the_targets_head(drafting: tuple[Oracle, list[Tensor]]) -> None:
    oracle, expected = drafting
    head = state_of(oracle.folder)["lm_head.weight"]
    torch.testing.assert_close(load_ours(oracle.folder).mtp.logits(expected[0]), expected[0] @ head.T, rtol=1e-4, atol=1e-4)


def test_without_mtp(oracle: Oracle) -> None:
    model = load_ours(oracle.folder)
    assert model.mtp is None
    assert model.spec.draft_kv_layers == 0


# ---------------------------------------------------------------------------------------------------- what is wrong with it
def test_missing_extra_and_misshapen_tensors_are_named(oracle: Oracle, tmp_path: Path) -> None:
    change = {
        "model.layers.0.mlp.router.classifier.weight": torch.ones(EXPERTS, HIDDEN),
        f"model.layers.0.mlp.experts.{EXPERTS}.down_proj.weight": torch.ones(HIDDEN, 24),
    }
    copy_checkpoint(oracle.folder, tmp_path, without=["model.layers.0.mlp.experts.3.up_proj.weight"], change=change)
    with pytest.raises(CheckpointError) as error:
        load_ours(tmp_path)
    for part in (
        "1 missing: model.layers.0.mlp.experts.3.up_proj.weight [24, 64]",
        "1 extra: model.layers.0.mlp.experts.8.down_proj.weight [64, 24]",
        "1 misshapen: model.layers.0.mlp.router.classifier.weight [8, 64] instead of [12, 64]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_method": "MHA"}, "attention_method: 'MHA'"),
        ({"zero_expert_type": "zeros"}, "zero_expert_type: 'zeros'"),
        ({"router_bias": True}, "router_bias: True"),
        ({"norm_topk_prob": True}, "norm_topk_prob: True"),
        ({"use_longcat_dsa": True}, "use_longcat_dsa: True"),
        ({"index_topk": 2048}, "index_topk: 2048"),
        ({"ngram_vocab_size_ratio": 78}, "ngram_vocab_size_ratio: 78"),
        ({"moe_topk": 13}, "moe_topk 13"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: 2"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_refusals_name_the_field(drafting: tuple[Oracle, list[Tensor]], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_ours(drafting[0].folder, **changes)
    assert named in str(error.value)


def test_scale_factors_can_be_off(tmp_path: Path) -> None:
    """Transformers has no such switch: its own factors are set to 1."""
    oracle = make_expert_oracle(CONFIGS["lite"](), tmp_path, BIAS)
    assert error_of(load_ours(oracle.folder, mla_scale_q_lora=False), oracle, "prefill") > TOLERANCE
    assert error_of(load_ours(oracle.folder, mla_scale_kv_lora=False), oracle, "prefill") > TOLERANCE
    oracle.known.clear()
    for attention in oracle.model.model.layers[0].self_attn:
        attention.mla_scale_q_lora = attention.mla_scale_kv_lora = 1.0
    check(load_ours(oracle.folder, mla_scale_q_lora=False, mla_scale_kv_lora=False), oracle, "prefill")
