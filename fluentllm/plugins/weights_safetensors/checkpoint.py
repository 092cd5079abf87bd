"""A safetensors checkpoint, opened lazily: headers at once, a tensor's bytes when it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from fluentllm.core.errors import CheckpointError
from fluentllm.core.protocols import PackedTensor
from fluentllm.hub.config import config_at
from fluentllm.hub.weight_files import SAFETENSORS

from . import SafetensorsSettings
from .blocks import SCALE_SUFFIX, dequantize_blocks, fp8_block
from .places import places_of
from .staging import stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

PACKED_BLOCK = (128, 128)
"""Blocks of `PackedTensor`'s kind `fp8_block`; others are dequantised."""


class SafetensorsCheckpoint:
    """`Checkpoint` over a folder. Raises `CheckpointError` for damaged files and quantisations that are not known."""

    config: Mapping[str, Any]

    def __init__(self, path: Path, reading: SafetensorsSettings | None = None) -> None:
        """`reading`: how `stream` reads."""
        self._reading = reading or SafetensorsSettings()
        self.config = config_at(path)
        self._block = fp8_block(self.config)
        self._files: dict[str, Any] = {}
        """Tensor → open file."""
        self._places: dict[str, Path] = {}
        self._stored: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        index = SAFETENSORS.read_index(path)
        for file in SAFETENSORS.files(path):
            self._open(file)
        _compare_with_index(path, index, self._places)
        self._scales = _pair_scales(self._dtypes, self._stored, self._block, path)

    def _open(self, file: Path) -> None:
        try:
            handle: Any = safe_open(file, framework="pt")
            for name in handle.offset_keys():
                if name in self._files:
                    first = self._places[name].name
                    raise CheckpointError(
                        f"The tensor {name!r} is in {first} and again in {file.name} of {file.parent}.",
                        fix="Remove one of the files.",
                    )
                part = handle.get_slice(name)
                self._files[name], self._places[name] = handle, file
                self._stored[name], self._dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        scales = set(self._scales.values())
        return {name: shape for name, shape in self._stored.items() if name not in scales}

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        tensor = self._read(name, device)
        scale = self._scales.get(name)
        if scale is None or self._block is None:
            return tensor
        return dequantize_blocks(tensor, self._read(scale, device), self._block)

    def stream(self, names: Sequence[str], device: torch.device) -> Iterator[torch.Tensor]:
        """What `read` gives for each name, in their order, read ahead by several threads; small neighbours share memory."""
        parts = self._parts([part for name in names for part in (name, self._scales.get(name)) if part is not None], device)
        for name in names:
            tensor = next(parts)
            if name not in self._scales or self._block is None:
                yield tensor
            else:
                yield dequantize_blocks(tensor, next(parts), self._block)

    def _parts(self, wanted: Sequence[str], device: torch.device) -> Iterator[torch.Tensor]:
        places = {name: place for file in {self._places[name] for name in wanted} for name, place in places_of(file).items()}
        unknown = [name for name in wanted if name not in places]
        if unknown:
            raise CheckpointError(f"{unknown[0]} is {self._dtypes[unknown[0]]}, which cannot be read.")
        return stream([places[name] for name in wanted], device, self._reading.threads, self._reading.staging_bytes)

    def _read(self, name: str, device: torch.device) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self._places[name], error) from error
        return tensor.to(device)

    def packed(self, name: str) -> PackedTensor | None:
        scale = self._scales.get(name)
        if scale is None or self._block != PACKED_BLOCK:
            return None
        cpu = torch.device("cpu")
        return _fp8_blocks(self._read(name, cpu), self._read(scale, cpu))

    def stream_packed(self, names: Sequence[str], device: torch.device) -> Iterator[PackedTensor | None]:
        """What `packed` gives for each name, on `device`, read ahead as `stream` does."""
        scales = self._scales if self._block == PACKED_BLOCK else {}
        parts = self._parts([part for name in names if name in scales for part in (name, scales[name])], device)
        for name in names:
            yield _fp8_blocks(next(parts), next(parts)) if name in scales else None

    def close(self) -> None:
        self._files.clear()


def _fp8_blocks(q: torch.Tensor, scale: torch.Tensor) -> PackedTensor:
    return PackedTensor("fp8_block", (q.shape[0], q.shape[1]), {"q": q, "scale": scale.float()})


def _compare_with_index(folder: Path, index: dict[str, str] | None, places: Mapping[str, Path]) -> None:
    if index is None:
        return
    wrong = [name for name, file in index.items() if name not in places or places[name].name != file]
    if wrong:
        raise CheckpointError(
            f"{folder / SAFETENSORS.index} names {len(wrong)} tensors that are not where it says: {', '.join(wrong[:8])}.",
            fix="Index and files are of different downloads: fetch them again.",
        )


def _pair_scales(
    dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], block: tuple[int, int] | None, folder: Path
) -> dict[str, str]:
    """FP8 weight → its scales. Raises `CheckpointError` where one has none, or of a shape that its blocks do not have."""
    scales: dict[str, str] = {}
    for name, dtype in dtypes.items():
        if dtype != "F8_E4M3":
            if dtype.startswith("F8_"):
                raise CheckpointError(f"{name} in {folder} is {dtype}; of the FP8 kinds only F8_E4M3 in blocks can be read.")
            continue
        scale = name + SCALE_SUFFIX
        if block is None or scale not in shapes:
            why = "its config.json has no quantization_config" if block is None else f"there is no {scale!r}"
            raise CheckpointError(f"{name} in {folder} is FP8 (F8_E4M3), but {why}: it cannot be scaled.")
        shape = shapes[name]
        expected = tuple(-(-size // side) for size, side in zip(shape, block, strict=False))
        if len(shape) != 2 or shapes[scale] != expected:
            seen = f"{scale} has shape {list(shapes[scale])}; {name} {list(shape)}"
            raise CheckpointError(f"{seen} in blocks of {block[0]} × {block[1]} needs {list(expected)}.")
        scales[name] = scale
    return scales


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"Cannot read {file}: {error}.", fix="It is cut off or damaged: fetch it again.")
