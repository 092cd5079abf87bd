"""Qwen2, Qwen3 and Qwen3-MoE against Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from oracle import SCENARIOS, check, check_every_tensor_matters, load_ours, make_oracle
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

if TYPE_CHECKING:
    from oracle import Oracle

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}

CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3_moe_sparse_step": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, norm_topk_prob=False, decoder_sparse_step=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree(oracle: Oracle, scenario: str) -> None:
    check(load_ours(oracle.folder), oracle, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree_in_fixed_order(oracle: Oracle, scenario: str) -> None:
    check(load_ours(oracle.folder, deterministic=True), oracle, scenario, deterministic=True)


def test_every_tensor_matters(oracle: Oracle) -> None:
    check_every_tensor_matters(oracle)
