"""A GGUF file as a `Checkpoint`: mapped into memory, dequantised tensor by tensor, under Hugging Face's names and shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize

from fluentllm.core.errors import CheckpointError
from fluentllm.core.protocols import PackedTensor
from fluentllm.hub.gguf_config import config_from_header
from fluentllm.hub.gguf_file import read_header

from .names import Source, row_order, sources

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

READABLE = {
    Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K,
}  # fmt: skip
_GROUP = 32
"""Values in a block of Q4_0 and Q4_1."""
_ROW_VALUES = 1 << 15


class GGUFCheckpoint:
    """Raises `CheckpointError` for a file that is cut off, of an unknown layout, or holds unknown block types."""

    config: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        self._path = path
        header = read_header(path)
        self.config = config_from_header(header)
        self._sources = sources(header, self.config)
        self._types: dict[str, Type] = {}
        for tensor in header.tensors.values():
            kind = self._types[tensor.name] = _type_of(path, tensor.name, tensor.type)
            block, size = GGML_QUANT_SIZES[kind]
            if not tensor.shape or tensor.shape[-1] % block:
                raise CheckpointError(
                    f"{path.name}: {tensor.name} {list(tensor.shape)} is not made of whole {kind.name} blocks."
                )
            if tensor.offset + math.prod(tensor.shape) // block * size > header.size:
                raise CheckpointError(f"{path.name} is cut off: {tensor.name} ends after the file.", fix="Fetch it again.")
        self._data: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: source.shape for name, source in self._sources.items()}

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        source = self._sources[name]
        kind = self._types[source.tensor.name]
        blocks = self._blocks(source, kind)
        if kind is Type.F32:
            values = torch.from_numpy(blocks.view(np.float32).copy())
        elif kind is Type.F16:
            values = torch.from_numpy(blocks.view(np.float16).copy())
        elif kind is Type.BF16:
            values = torch.from_numpy(blocks.copy()).view(torch.bfloat16)
        else:
            values = torch.from_numpy(dequantize(_widened(blocks, kind), kind))
        values = values.reshape(source.shape)
        if source.heads:
            values = values[row_order(source.shape[0], source.heads)]
        return values.to(device)

    def packed(self, name: str) -> PackedTensor | None:
        """Q4_1 and Q8_0 as they are, Q4_0 as Q4_1 with m = -8d."""
        source = self._sources[name]
        kind = self._types[source.tensor.name]
        if kind not in (Type.Q4_0, Type.Q4_1, Type.Q8_0) or len(source.shape) != 2:
            return None
        rows, columns = source.shape
        blocks = self._blocks(source, kind).reshape(rows, columns // _GROUP, -1)
        d = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
        if kind is Type.Q8_0:
            values = blocks[..., 2:].copy().view(np.int8).reshape(rows, columns)
            return self._in_order(
                source, PackedTensor("q8_0", (rows, columns), {"q": torch.from_numpy(values), "d": torch.from_numpy(d)})
            )
        m = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32) if kind is Type.Q4_1 else -8 * d
        nibbles = blocks[..., -_GROUP // 2 :]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(rows, columns)
        parts = {"q": torch.from_numpy(q), "d": torch.from_numpy(d), "m": torch.from_numpy(m)}
        return self._in_order(source, PackedTensor("q4_1", (rows, columns), parts))

    def _in_order(self, source: Source, packed: PackedTensor) -> PackedTensor:
        """Rows as Hugging Face orders them."""
        if source.heads:
            order = torch.tensor(row_order(packed.shape[0], source.heads))
            packed.parts = {key: part[order] for key, part in packed.parts.items()}
        return packed

    def _blocks(self, source: Source, kind: Type) -> np.ndarray:
        """The tensor's bytes, [rows, bytes of a row], still in the file."""
        block, size = GGML_QUANT_SIZES[kind]
        width = source.shape[-1] // block * size
        count = math.prod(source.shape[:-1])
        start = source.tensor.offset + (source.expert or 0) * count * width
        return self._data[start : start + count * width].reshape(count, width)

    def close(self) -> None:
        self._data = np.empty(0, dtype=np.uint8)


def _widened(blocks: np.ndarray, kind: Type) -> np.ndarray:
    """The same bytes in fewer, longer rows: `dequantize` takes 16 rows at a time, however short they are."""
    rows, width = blocks.shape
    values = width // GGML_QUANT_SIZES[kind][1] * GGML_QUANT_SIZES[kind][0]
    factor = math.gcd(rows, 1 << max(0, (_ROW_VALUES // values).bit_length() - 1))
    return blocks.reshape(rows // factor, width * factor)


def _type_of(path: Path, name: str, number: int) -> Type:
    known = number in Type._value2member_map_
    if not known or Type(number) not in READABLE:
        called = Type(number).name if known else f"number {number}"
        readable = ", ".join(sorted(kind.name for kind in READABLE))
        raise CheckpointError(
            f"{path.name}: {name} has the block type {called}; readable are {readable}.", fix="Take another quantisation."
        )
    return Type(number)
