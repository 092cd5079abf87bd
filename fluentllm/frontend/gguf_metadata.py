"""The key-value header of a GGUF file as plain Python values, without touching its tensors.

The front end needs a file's vocabulary, merges and chat template at every start. The `gguf` package's reader makes several
numpy arrays of every string, seconds for a large vocabulary; this reads the same header in a tenth of a second.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_COUNT = struct.Struct("<Q")
_KIND = struct.Struct("<I")
_ARRAY_HEAD = struct.Struct("<IQ")


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the header: numbers, booleans, strings, and lists of them.

    Raises `CheckpointError` for a file that is no GGUF, is cut short, or is of an unknown version.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{path} is empty, not a GGUF file.", fix="Fetch the file again.") from None
        with data:
            if data[:4] != b"GGUF":
                raise CheckpointError(
                    f"{path} does not start with 'GGUF' but with {data[:4]!r}.",
                    fix="Name a .gguf file or a folder with config.json.",
                )
            try:
                return _Reader(data).header()
            except (struct.error, UnicodeDecodeError, IndexError) as error:
                raise CheckpointError(
                    f"The header of {path} is damaged or cut short ({error}).", fix="Fetch the file again."
                ) from error


class _Reader:
    """A position in the mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 4

    def header(self) -> dict[str, Any]:
        (version,) = self.take(_KIND)
        if version not in (2, 3):
            raise CheckpointError(
                f"The file is GGUF version {version}; versions 2 and 3 (little endian) are known.",
                fix="Convert it with a current llama.cpp.",
            )
        self.take(_COUNT)  # tensors
        (keys,) = self.take(_COUNT)
        values = {}
        for _ in range(keys):
            key = self.string()
            (kind,) = self.take(_KIND)
            values[key] = self.value(kind)
        return values

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        values = form.unpack_from(self.data, self.at)
        self.at += form.size
        return values

    def string(self) -> str:
        (length,) = self.take(_COUNT)
        end = self.at + length
        if end > len(self.data):
            raise IndexError(f"a string of {length} bytes at byte {self.at} ends after the file")
        text = self.data[self.at : end].decode()
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.take(_ARRAY_HEAD)
            if item in _SCALARS:
                return list(self.take(struct.Struct(f"<{count}{_SCALARS[item]}")))
            if count > len(self.data):
                raise IndexError(f"an array of {count} values at byte {self.at} ends after the file")
            return [self.value(item) for _ in range(count)]
        if kind in _SCALARS:
            return self.take(struct.Struct(f"<{_SCALARS[kind]}"))[0]
        raise IndexError(f"unknown value type {kind} at byte {self.at}")
