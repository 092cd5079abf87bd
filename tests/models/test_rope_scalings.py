"""Every kind of rope scaling against Transformers, at positions beyond the original context; others are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from oracle import TOLERANCE, check, error_of, family_of, load_ours, make_oracle
from test_llama import SMALL
from transformers import LlamaConfig

from fluentllm.assembly.choices import max_model_len
from fluentllm.core.config import load
from fluentllm.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0},
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 0.7,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, rope_parameters={"rope_theta": 100.0, **KINDS[kind]})
    oracle = make_oracle(config, tmp_path, lengths=(90, 9, 40))
    for scenario in ("prefill", "decode", "mixed"):
        check(load_ours(tmp_path), oracle, scenario)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dynamic"])
def test_the_scaling_matters(kind: str, tmp_path: Path) -> None:
    """(Within the original context `dynamic` changes nothing, see below.)"""
    config = LlamaConfig(**SMALL, rope_parameters={"rope_theta": 100.0, **KINDS[kind]})
    oracle = make_oracle(config, tmp_path, lengths=(90, 9, 40))
    ignored = load_ours(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert error_of(ignored, oracle, "prefill") > 10 * TOLERANCE


def test_dynamic_scaling_is_offered_as_far_as_it_changes_nothing(tmp_path: Path) -> None:
    """From the original context on its frequencies depend on a sequence's length, which keys in a cache cannot follow: logits
    are Transformers' to the last position before, and a longer context is refused with the length that is possible."""
    config = LlamaConfig(**SMALL, rope_parameters={"rope_theta": 100.0, **KINDS["dynamic"]})
    oracle = make_oracle(config, tmp_path, lengths=(config.max_position_embeddings, 9, 40))
    check(load_ours(tmp_path), oracle, "prefill")
    given = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    spec = family_of(given).spec(given)
    longer = load(None, {"model.max_model_len": config.max_position_embeddings + 1}, {}).settings
    with pytest.raises(ConfigError, match=f"context is {config.max_position_embeddings} tokens"):
        max_model_len(longer, spec)


def test_the_older_spelling_is_read_too(tmp_path: Path) -> None:
    """`rope_scaling` with `type`, and `rope_theta` beside it."""
    config = LlamaConfig(**SMALL, rope_parameters={"rope_theta": 100.0, **KINDS["linear"]})
    oracle = make_oracle(config, tmp_path, lengths=(90, 9, 40))
    older = load_ours(tmp_path, rope_parameters=None, rope_theta=100.0, rope_scaling={"type": "linear", "factor": 4.0})
    check(older, oracle, "prefill")


@pytest.mark.parametrize("kind", ["longrope", "su", "mrope", "proportional"])
def test_others_are_refused_by_name(kind: str) -> None:
    config = {**LlamaConfig(**SMALL).to_dict(), "architectures": ["LlamaForCausalLM"]}
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    with pytest.raises(CheckpointError, match=kind):
        family_of(config).spec(config)
