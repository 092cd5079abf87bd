"""DeepSeek-V3's MTP layer against the plain formula: at prefill, step by step, and what a checkpoint may leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from oracle import TOLERANCE, check, load_ours
from references.plain import MLAShape, deepseek_mtp
from test_deepseek import CONFIGS

from fluentllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle
    from torch import Tensor

MTP = "model.layers.2"


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, list[Tensor]]:
    """A V3 checkpoint with an MTP layer, and what the plain reference makes of the three sequences."""
    oracle = make_expert_oracle(CONFIGS["v3"](), tmp_path_factory.mktemp("mtp"), bias=0.05)
    state = add_tensors(oracle.folder, mtp_shapes(state_of(oracle.folder)))
    rotary = oracle.model.model.rotary_emb
    shape = MLAShape(
        heads=4,
        nope=16,
        rope=8,
        value=12,
        frequencies=rotary.inv_freq,
        rotary_scale=rotary.attention_scaling,
        softmax_scale=oracle.model.model.layers[0].self_attn.scaling,
    )
    moe = {"top_k": 3, "groups": 4, "top_groups": 2, "scale": 1.7}
    expected = [deepseek_mtp(state, MTP, tokens, target_hidden(oracle, tokens), shape, 1e-6, moe) for tokens in oracle.tokens]
    return oracle, expected


def mtp_shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The MoE layer's tensors once more, and those that join token and hidden state."""
    shapes = {
        name.replace("model.layers.1.", f"{MTP}."): tuple(tensor.shape)
        for name, tensor in state.items()
        if name.startswith("model.layers.1.")
    }
    hidden, vocab = 64, 96
    shapes |= {f"{MTP}.{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{MTP}.{name}.weight": (vocab, hidden) for name in ("embed_tokens", "shared_head.head")}
    return {**shapes, f"{MTP}.eh_proj.weight": (hidden, 2 * hidden)}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("way", DRAFTING)
def test_mtp_agrees_with_the_formula(drafting: tuple[Oracle, list[Tensor]], way: str, deterministic: bool) -> None:
    oracle, expected = drafting
    model = load_ours(oracle.folder, deterministic=deterministic)
    assert model.mtp.kv_layer == model.spec.kv.layers
    assert model.spec.draft_kv_layers == 1
    assert draft_error(model, oracle, expected, way, deterministic=deterministic) <= TOLERANCE


def test_every_tensor_of_the_mtp_layer_matters(drafting: tuple[Oracle, list[Tensor]]) -> None:
    oracle, expected = drafting
    state = state_of(oracle.folder)
    names = [name for name in state if name.startswith(f"{MTP}.") and "shared_head.head" not in name]
    assert len(names) > 30
    for name in names:
        assert draft_error(load_ours(oracle.folder, perturb=name), oracle, expected, "prefill") > TOLERANCE, name


def test_mtp_logits_come_from_its_own_head_or_the_targets(drafting: tuple[Oracle, list[Tensor]], tmp_path: Path) -> None:
    oracle, expected = drafting
    state = state_of(oracle.folder)
    own = state[f"{MTP}.shared_head.head.weight"]
    torch.testing.assert_close(load_ours(oracle.folder).mtp.logits(expected[0]), expected[0] @ own.T, rtol=1e-4, atol=1e-4)
    copy_checkpoint(oracle.folder, tmp_path, without={f"{MTP}.shared_head.head.weight", f"{MTP}.embed_tokens.weight"})
    model = load_ours(tmp_path)
    assert model.mtp.embedding is model.embedding
    torch.testing.assert_close(model.mtp.logits(expected[0]), model.logits(expected[0]))


def test_mtp_shares_what_is_a_copy_of_the_targets(drafting: tuple[Oracle, list[Tensor]], tmp_path: Path) -> None:
    oracle, _ = drafting
    state = state_of(oracle.folder)
    copies = {
        f"{MTP}.shared_head.head.weight": state["lm_head.weight"].clone(),
        f"{MTP}.embed_tokens.weight": state["model.embed_tokens.weight"].clone(),
    }
    copy_checkpoint(oracle.folder, tmp_path, change=copies)
    model = load_ours(tmp_path)
    assert model.mtp.embedding is model.embedding
    assert model.mtp.head is None


def test_target_is_the_same_with_and_without_mtp(drafting: tuple[Oracle, list[Tensor]], tmp_path: Path) -> None:
    oracle, _ = drafting
    state = state_of(oracle.folder)
    copy_checkpoint(oracle.folder, tmp_path, without={name for name in state if name.startswith(f"{MTP}.")})
    for folder, draft_layers in ((oracle.folder, 1), (tmp_path, 0)):
        model = load_ours(folder)
        assert model.spec.draft_kv_layers == draft_layers
        assert (model.mtp is None) == (draft_layers == 0)
        check(model, oracle, "prefill")


def test_half_an_mtp_layer_is_an_error(drafting: tuple[Oracle, list[Tensor]], tmp_path: Path) -> None:
    copy_checkpoint(drafting[0].folder, tmp_path, without={f"{MTP}.eh_proj.weight"})
    with pytest.raises(CheckpointError, match=r"part of an MTP layer.*layers\.2\.eh_proj\.weight"):
        load_ours(tmp_path)
