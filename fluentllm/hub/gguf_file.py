"""Reads the header of a GGUF file: metadata and where each tensor lies. Torch-free, numpy-free.

The `gguf` package's reader takes seconds for a tokenizer's string arrays, in each process that opens the file; this takes
about a tenth of one. Tensor data stays in the file; block formats are the `gguf` package's business.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 8


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies."""

    name: str
    type: int
    """As `gguf.GGMLQuantizationType` counts."""
    shape: tuple[int, ...]
    """Outermost first, as in torch (the file has them the other way round)."""
    offset: int
    """Bytes from the start of the file."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says about itself."""

    path: Path
    metadata: dict[str, Any]
    """Key → number, string, bool or list of these."""
    tensors: dict[str, GGUFTensor]
    """By name, in the order of their data."""
    size: int
    """Of the file, in bytes."""


def read_header(path: Path) -> GGUFHeader:
    """Raises `CheckpointError` if the file is not GGUF, of an unknown version, or cut off."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it does not start with {MAGIC!r}.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise CheckpointError(f"The header of {path} is cut off or damaged ({error}).", fix="Fetch the file again.") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 4

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "a big-endian GGUF" if big else f"GGUF version {version}"
            raise CheckpointError(f"{self.path} is {what}; versions 2 and 3, little endian, can be read.")
        tensor_count, key_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        infos = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{self.path} has general.alignment {alignment!r}.")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            if name in tensors:
                raise CheckpointError(f"{self.path} has the tensor {name!r} twice.")
            tensors[name] = GGUFTensor(name, kind, shape, start + offset)
        return GGUFHeader(self.path, metadata, tensors, len(self.data))

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.at + length
        if end > len(self.data):
            raise IndexError(f"a string of {length} bytes at byte {self.at}")
        text = self.data[self.at : end].decode("utf-8", errors="replace")
        self.at = end
        return text

    def strings(self, count: int) -> list[str]:
        """`string`, `count` times, without a call for each: vocabularies have hundreds of thousands."""
        data, at, size, length_at = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8
            if at + length > size:
                raise IndexError(f"a string of {length} bytes at byte {at}")
            texts.append(data[at : at + length].decode("utf-8", "replace"))
            at += length
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(0)
        if kind not in _SCALARS:
            raise IndexError(f"a value of unknown type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def array(self, depth: int) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data) or depth > _MAX_DIMS:
            raise IndexError(f"an array of {count} items at byte {self.at}")
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            return [self.array(depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError(f"an array of unknown type {kind} at byte {self.at}")
        code = f"<{count}{_SCALARS[kind]}"
        values = list(struct.unpack_from(code, self.data, self.at))
        self.at += struct.calcsize(code)
        return values

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        dims = self.scalar("I")
        if dims > _MAX_DIMS:
            raise IndexError(f"tensor {name!r} with {dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        return name, self.scalar("I"), shape, self.scalar("Q")


def read_floats(header: GGUFHeader, tensor: GGUFTensor) -> list[float]:
    """The values of a small float32 tensor (type 0), such as `rope_freqs.weight`."""
    count = 1
    for size in tensor.shape:
        count *= size
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(4 * count)
    if tensor.type != 0 or len(data) != 4 * count:
        raise CheckpointError(f"{header.path}: the tensor {tensor.name!r} is cut off or not float32.")
    return list(struct.unpack(f"<{count}f", data))
