"""Reading safetensors: one file and many, block-FP8, and checkpoints that are broken."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from fluentllm.core.errors import CheckpointError
from fluentllm.kernels.quantise import dequantise_blocks
from fluentllm.plugins.weights_safetensors import supports
from fluentllm.plugins.weights_safetensors.blocks import dequantize_blocks
from fluentllm.plugins.weights_safetensors.checkpoint import SafetensorsCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def write_config(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": torch.randn(7, 5),
        "model.layers.0.mlp.up_proj.weight": torch.randn(3, 5).bfloat16(),
        "model.layers.1.mlp.up_proj.weight": torch.randn(3, 5).half(),
        "model.norm.weight": torch.randn(5),
    }


@pytest.fixture(params=["one file", "shards with an index", "shards without an index"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same tensors, stored in each of the usual ways."""
    write_config(tmp_path)
    if request.param == "one file":
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    if request.param == "shards with an index":
        write_index(tmp_path, {name: file for file, part in shards.items() for name in part})
    return tmp_path


def test_reads_what_was_saved(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = SafetensorsCheckpoint(folder)
    assert dict(checkpoint.shapes()) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        ours = checkpoint.read(name, CPU)
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)
        assert checkpoint.packed(name) is None
    checkpoint.close()


def test_names_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    """safetensors stores wide dtypes first, whatever the names: reading in that order is reading forward."""
    write_config(tmp_path)
    save_file({"a": torch.zeros(2).bfloat16(), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(SafetensorsCheckpoint(tmp_path).shapes()) == ["b", "a"]


def test_end_of_sequence_ids_are_gathered_from_both_configs(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert SafetensorsCheckpoint(tmp_path).config["eos_token_id"] == [5, 7]


# ------------------------------------------------------------------------------------------------------------- block-FP8
def plain_dequantize(weight: torch.Tensor, scale: torch.Tensor, side: tuple[int, int]) -> torch.Tensor:
    """Value by value: each times the scale of the tile that it lies in."""
    rows, columns = weight.shape
    row_tile = torch.arange(rows) // side[0]
    column_tile = torch.arange(columns) // side[1]
    return weight.float() * scale[row_tile][:, column_tile]


@pytest.mark.parametrize("shape", [(128, 256), (1, 1), (127, 129), (300, 130), (64, 576)])
def test_fp8_blocks_with_ragged_edges(tmp_path: Path, shape: tuple[int, int]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.5
    norm = torch.randn(9)
    write_config(tmp_path, quantization_config=FP8)
    save_file({name: weight, name + "_scale_inv": scale, "model.norm.weight": norm}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert dict(checkpoint.shapes()) == {name: shape, "model.norm.weight": (9,)}
    ours = checkpoint.read(name, CPU)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, plain_dequantize(weight, scale, (128, 128)))
    packed = checkpoint.packed(name)
    assert packed is not None
    assert (packed.kind, packed.shape) == ("fp8_block", shape)
    assert torch.equal(dequantise_blocks(packed.kind, packed.parts), ours)
    assert checkpoint.packed("model.norm.weight") is None
    assert torch.equal(checkpoint.read("model.norm.weight", CPU), norm)


def test_blocks_need_not_be_square() -> None:
    weight, scale = torch.randn(10, 9).to(torch.float8_e4m3fn), torch.rand(5, 3)
    assert torch.equal(dequantize_blocks(weight, scale, (2, 4)), plain_dequantize(weight, scale, (2, 4)))


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config=FP8)
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight .* there is no 'a\.weight_scale_inv'"):
        SafetensorsCheckpoint(tmp_path)


def test_fp8_that_the_config_does_not_mention_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no quantization_config"):
        SafetensorsCheckpoint(tmp_path)


def test_scales_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config=FP8)
    parts = {"a.weight": torch.zeros(200, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    save_file(parts, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \[1, 1\]; .* needs \[2, 1\]"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], named: str) -> None:
    write_config(tmp_path, quantization_config=quantization)
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        SafetensorsCheckpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- broken
@pytest.mark.parametrize("keep", [0, 4, 20, -10])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], keep: int) -> None:
    write_config(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"Cannot read .*model\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in a\.safetensors and again in b\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 files .* two\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_that_names_tensors_that_are_not_there(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match="names 1 tensors that are not where it says: b"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not an index"):
        SafetensorsCheckpoint(tmp_path)


def test_supports_tells_what_is_lacking(tmp_path: Path) -> None:
    assert "no config.json" in (supports(tmp_path) or "")
    write_config(tmp_path)
    assert "no *.safetensors" in (supports(tmp_path) or "")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert supports(tmp_path) is None
    assert "not a folder" in (supports(tmp_path / "model.safetensors") or "")
