"""Reading GGUF: every block type, both layouts, names, row order, packed blocks, and files that are broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from fluentllm.core.errors import CheckpointError
from fluentllm.plugins.weights_gguf import supports
from fluentllm.plugins.weights_gguf.checkpoint import READABLE, GGUFCheckpoint
from fluentllm.plugins.weights_gguf.names import row_order

from .conftest import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import SmallGGUF

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


def hf_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the Llama layout's row order, by reshaping: [head, pair, side] → [head, side, pair]."""
    rest = rows.shape[1:]
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("kind", sorted(READABLE), ids=lambda kind: kind.name)
def test_every_block_type_reads_as_gguf_dequantises_it(small_gguf: Callable[..., SmallGGUF], kind: Type) -> None:
    small = small_gguf("llama", kind)
    checkpoint = GGUFCheckpoint(small.write())
    for name, theirs in {
        UP: small.values["blk.1.ffn_up.weight"],
        "model.embed_tokens.weight": small.values["token_embd.weight"],
        Q: hf_rows(small.values["blk.1.attn_q.weight"], HEADS),
        K: hf_rows(small.values["blk.1.attn_k.weight"], KV_HEADS),
    }.items():
        ours = checkpoint.read(name, CPU)
        assert ours.shape == checkpoint.shapes()[name]
        assert torch.equal(ours.float(), torch.from_numpy(theirs)), name


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", [UP, Q, K])
def test_packed_blocks_mean_the_same_values(small_gguf: Callable[..., SmallGGUF], kind: Type, name: str) -> None:
    checkpoint = GGUFCheckpoint(small_gguf("llama", kind).write())
    packed = checkpoint.packed(name)
    assert packed is not None
    assert packed.kind == "q4_1"
    q, d, m = packed.parts["q"], packed.parts["d"], packed.parts["m"]
    assert q.dtype == torch.uint8
    assert int(q.max()) <= 15
    rows, columns = packed.shape
    values = q.view(rows, columns // 32, 32).float() * d[..., None] + m[..., None]
    assert torch.equal(values.view(rows, columns), checkpoint.read(name, CPU))


@pytest.mark.parametrize("name", [UP, Q])
def test_blocks_of_eight_bits_are_packed_too(small_gguf: Callable[..., SmallGGUF], name: str) -> None:
    checkpoint = GGUFCheckpoint(small_gguf("llama", Type.Q8_0).write())
    packed = checkpoint.packed(name)
    assert packed is not None
    assert packed.kind == "q8_0"
    q, d = packed.parts["q"], packed.parts["d"]
    assert q.dtype == torch.int8
    values = q.unflatten(1, (-1, 32)).float() * d[..., None]
    assert torch.equal(values.flatten(1), checkpoint.read(name, CPU))


def test_other_block_types_are_not_packed(small_gguf: Callable[..., SmallGGUF]) -> None:
    checkpoint = GGUFCheckpoint(small_gguf("llama", Type.Q6_K).write())
    assert checkpoint.packed(UP) is None


def test_row_order_turns_interleaved_rotary_into_half_rotary(small_gguf: Callable[..., SmallGGUF]) -> None:
    """The file's rows with rotary on neighbours give the same scores as ours with rotary on halves, as Hugging Face has it."""
    small = small_gguf("llama")
    checkpoint = GGUFCheckpoint(small.write())
    x = torch.randn(2, HIDDEN)
    angles = torch.arange(2)[:, None] * 50000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
        v = (x @ rows.T).view(2, heads, HEAD_DIM // 2, 2)
        a, b = v[..., 0], v[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)

    def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
        a, b = (x @ rows.T).view(2, heads, 2, HEAD_DIM // 2).unbind(2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    file_q, file_k = (torch.from_numpy(small.values[f"blk.1.attn_{part}.weight"]) for part in "qk")
    theirs_q, theirs_k = neighbours(file_q, HEADS), neighbours(file_k, KV_HEADS)
    ours_q, ours_k = halves(checkpoint.read(Q, CPU), HEADS), halves(checkpoint.read(K, CPU), KV_HEADS)
    theirs = torch.einsum("qhd,khd->hqk", theirs_q, theirs_k.repeat_interleave(2, 1))
    ours = torch.einsum("qhd,khd->hqk", ours_q, ours_k.repeat_interleave(2, 1))
    torch.testing.assert_close(ours, theirs)


def test_row_order_is_a_permutation_within_heads() -> None:
    assert row_order(8, 2) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert sorted(row_order(96, 3)) == list(range(96))


@pytest.mark.parametrize("layout", ["llama", "qwen2", "qwen3"])
def test_agrees_with_transformers_own_gguf_reader(small_gguf: Callable[..., SmallGGUF], layout: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = small_gguf(layout, tied=False).write()
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    checkpoint = GGUFCheckpoint(path)
    assert set(checkpoint.shapes()) == set(theirs) == set(model.state_dict())
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name, CPU), tensor), name
    ours = checkpoint.config
    assert ours["architectures"] == [type(model).__name__]
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        assert ours[key] == getattr(config, key), key
    assert ours["rms_norm_eps"] == pytest.approx(config.rms_norm_eps)
    assert ours["rope_theta"] == pytest.approx(config.rope_parameters["rope_theta"])
    assert ours["max_position_embeddings"] == config.max_position_embeddings
    assert ours["tie_word_embeddings"] == config.tie_word_embeddings


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_K, Type.Q8_0], ids=lambda kind: kind.name)
def test_stacks_of_experts_are_split(small_gguf: Callable[..., SmallGGUF], kind: Type) -> None:
    small = small_gguf("qwen3moe", kind)
    checkpoint = GGUFCheckpoint(small.write())
    assert checkpoint.config["num_experts"] == 4
    assert checkpoint.config["moe_intermediate_size"] == FFN
    for expert in range(4):
        for part, stack in (("gate", "ffn_gate_exps"), ("up", "ffn_up_exps"), ("down", "ffn_down_exps")):
            ours = checkpoint.read(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight", CPU)
            assert torch.equal(ours, torch.from_numpy(small.values[f"blk.1.{stack}.weight"][expert]))
    assert checkpoint.shapes()["model.layers.0.mlp.gate.weight"] == (4, HIDDEN)
    assert not any("exps" in name for name in checkpoint.shapes())


def test_packed_experts_of_a_stack(small_gguf: Callable[..., SmallGGUF]) -> None:
    checkpoint = GGUFCheckpoint(small_gguf("qwen3moe", Type.Q4_1).write())
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    packed = checkpoint.packed(name)
    assert packed is not None
    values = packed.parts["q"].view(HIDDEN, -1, 32).float() * packed.parts["d"][..., None] + packed.parts["m"][..., None]
    assert torch.equal(values.view(HIDDEN, FFN), checkpoint.read(name, CPU))


def test_tied_output_is_not_listed(small_gguf: Callable[..., SmallGGUF]) -> None:
    checkpoint = GGUFCheckpoint(small_gguf("llama").write())
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.shapes()


def test_a_separate_output_is_the_head(small_gguf: Callable[..., SmallGGUF]) -> None:
    small = small_gguf("llama", tied=False)
    checkpoint = GGUFCheckpoint(small.write())
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.shapes()["lm_head.weight"] == (VOCAB, HIDDEN)
    assert torch.equal(checkpoint.read("lm_head.weight", CPU), torch.from_numpy(small.values["output.weight"]))


def test_a_file_cut_off_in_its_tensors_names_the_tensor(small_gguf: Callable[..., SmallGGUF]) -> None:
    path = small_gguf("llama").write()
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 100_000)
    with pytest.raises(CheckpointError, match=r"cut off: .*weight ends after the file"):
        GGUFCheckpoint(path)


def test_an_unknown_tensor_is_named(small_gguf: Callable[..., SmallGGUF]) -> None:
    small = small_gguf("llama")
    small.add("blk.0.attn_sinks.weight", (HEADS,))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_sinks\.weight' \[4\]"):
        GGUFCheckpoint(small.write())


def test_an_unknown_block_type_is_named(small_gguf: Callable[..., SmallGGUF]) -> None:
    small = small_gguf("llama")
    small.writer.add_tensor("blk.0.attn_q.bias", np.zeros((1, 66), dtype=np.uint8), raw_dtype=Type.IQ2_XXS)
    with pytest.raises(CheckpointError, match="block type IQ2_XXS; readable are"):
        GGUFCheckpoint(small.write())


def test_supports_tells_what_it_is_not(tmp_path: Path, small_gguf: Callable[..., SmallGGUF]) -> None:
    assert supports(small_gguf("llama").write()) is None
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK\x03\x04")
    assert "not a GGUF file" in (supports(other) or "")
    assert "not a file" in (supports(tmp_path) or "")
