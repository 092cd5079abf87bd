"""Checkpoints in PyTorch's own files: as from safetensors, and nothing of them runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from fluentllm.core.errors import CheckpointError
from fluentllm.plugins.weights_torch import supports
from fluentllm.plugins.weights_torch.checkpoint import TorchCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


def tensors() -> dict[str, torch.Tensor]:
    made = {f"t{i}": torch.randn(3, i, 2).to(dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))}
    return made | {"ids": torch.arange(7), "turned": torch.randn(4, 5).t(), "empty": torch.zeros(0, 3)}


def folder(path: Path) -> Path:
    (path / "config.json").write_text('{"architectures": ["Any"]}')
    return path


@pytest.mark.parametrize("layout", ["one file", "an index", "no index", "an old file"])
def test_every_tensor_is_read_as_it_was_saved(layout: str, tmp_path: Path) -> None:
    made = tensors()
    if layout in ("one file", "an old file"):
        torch.save(made, folder(tmp_path) / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "one file")
    else:
        halves = {f"pytorch_model-{n}-of-2.bin": dict(list(made.items())[n::2]) for n in range(2)}
        for name, part in halves.items():
            torch.save(part, folder(tmp_path) / name)
        if layout == "an index":
            index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert supports(tmp_path) is None
    checkpoint = TorchCheckpoint(tmp_path)
    assert checkpoint.shapes() == {name: tuple(tensor.shape) for name, tensor in made.items()}
    for name, tensor in made.items():
        found = checkpoint.read(name, CPU)
        assert found.dtype is tensor.dtype
        assert found.is_contiguous()
        assert torch.equal(found, tensor)
    checkpoint.close()
    assert not checkpoint.shapes()


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    torch.save(tensors(), folder(tmp_path) / "pytorch_model.bin")
    (tmp_path / "model.safetensors").touch()
    assert "has safetensors" in str(supports(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    assert "no pytorch_model.bin" in str(supports(tmp_path))


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("it ran",)


def test_what_is_no_checkpoint_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder(tmp_path) / "pytorch_model.bin"
    for content, said in (
        ({"w": torch.ones(2), "harm": Harmful()}, "holds more than tensors, which is not unpickled"),
        ({"w": torch.ones(2), "epoch": 3}, "a dictionary of other things too"),
        ([torch.ones(2)], "a list, not one of tensors by their names"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=said) as error:
            TorchCheckpoint(tmp_path)
        assert "safetensors" in str(error.value.fix)
    assert "it ran" not in capsys.readouterr().out
    torch.save(tensors(), file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"version https://git-lfs"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            TorchCheckpoint(tmp_path)


def test_a_file_that_the_index_names_is_missing(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder(tmp_path) / "pytorch_model-1.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 files that its index names: pytorch_model-2\.bin"):
        TorchCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(CheckpointError, match=r"'a' is in pytorch_model-2\.bin"):
        TorchCheckpoint(tmp_path)
