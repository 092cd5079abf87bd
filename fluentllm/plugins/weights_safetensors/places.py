"""Where tensors lie in safetensors files, and which of them are read in one go.

Format: https://huggingface.co/docs/safetensors, "Format": 8 bytes of header length, little-endian; the header, JSON; the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fluentllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPAN_BYTES = 64 << 20
"""Most bytes of neighbours that become one span."""
ALONE_BYTES = 16 << 20
"""A tensor of so many bytes is a span of its own: whoever keeps it keeps no neighbours alive."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's bytes: `file`[start : start + nbytes]."""

    name: str
    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(slots=True)
class Span:
    """Neighbours in one file, read and copied as one."""

    places: list[Place]
    nbytes: int

    @property
    def file(self) -> Path:
        return self.places[0].file

    @property
    def start(self) -> int:
        return self.places[0].start

    def takes(self, place: Place) -> bool:
        """Does `place` follow directly, on an address that its dtype allows?"""
        offset = place.start - self.start
        return (
            place.file == self.file
            and offset == self.nbytes
            and offset % place.dtype.itemsize == 0
            and self.nbytes + place.nbytes <= SPAN_BYTES
            and place.nbytes < ALONE_BYTES
            and self.places[-1].nbytes < ALONE_BYTES
        )


def places_of(file: Path) -> dict[str, Place]:
    """Tensor → place, of a file that `safetensors` has opened without complaint. Tensors of dtypes that torch lacks stay
    out."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found = {}
    for name, about in header.items():
        dtype = DTYPES.get(about["dtype"]) if name != "__metadata__" else None
        if dtype is not None:
            start, end = about["data_offsets"]
            found[name] = Place(name, file, 8 + length + start, end - start, dtype, tuple(about["shape"]))
    return found


def spans_of(places: Iterable[Place]) -> Iterator[Span]:
    """The same places in the same order."""
    span: Span | None = None
    for place in places:
        if span is not None and span.takes(place):
            span.places.append(place)
            span.nbytes += place.nbytes
            continue
        if span is not None:
            yield span
        span = Span([place], place.nbytes)
    if span is not None:
        yield span


def cut_off(file: Path) -> CheckpointError:
    return CheckpointError(f"Cannot read {file}: it ends too early.", fix="It is cut off: fetch it again.")
