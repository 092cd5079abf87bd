"""A checkpoint in PyTorch's own files. Only tensors are unpickled (`weights_only`): no code of the file's runs. `pickle` is
imported for the name of its error."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

from fluentllm.core.errors import CheckpointError
from fluentllm.hub.config import config_at
from fluentllm.hub.weight_files import PYTORCH

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fluentllm.core.protocols import PackedTensor


class TorchCheckpoint:
    """`Checkpoint` over a folder; files are mapped. Raises `CheckpointError` for damaged ones, and for what is no tensor."""

    config: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        self.config = config_at(path)
        self._tensors: dict[str, torch.Tensor] = {}
        for file in PYTORCH.files(path):
            for name, tensor in _tensors_of(file).items():
                if name in self._tensors:
                    raise CheckpointError(f"The tensor {name!r} is in {file.name} of {path} and in a file before it.")
                self._tensors[name] = tensor

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        return self._tensors[name].contiguous().to(device)

    def packed(self, name: str) -> PackedTensor | None:
        return None

    def close(self) -> None:
        self._tensors = {}


def _tensors_of(file: Path) -> dict[str, torch.Tensor]:
    fix = "Fetch it again, or save it as safetensors."
    try:
        found = _loaded(file)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, which is not unpickled: {_first_line(error)}", fix=fix
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {file}: {_first_line(error)}", fix=fix) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        kind = "a dictionary of other things too" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise CheckpointError(f"{file} is {kind}, not one of tensors by their names.", fix=fix)
    return found


def _loaded(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # files from before PyTorch 1.6


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
