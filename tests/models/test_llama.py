"""Llama and Mistral against Transformers: same checkpoint, same logits, however the rows are cut into passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from oracle import SCENARIOS, check, check_every_tensor_matters, load_ours, make_oracle
from transformers import LlamaConfig, MistralConfig

if TYPE_CHECKING:
    from oracle import Oracle

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama_tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama_biases": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, head_dim=32),
    "mistral": lambda: MistralConfig(**{**SMALL, "num_key_value_heads": 1}, sliding_window=None, head_dim=32),
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
