"""Random weights as a `Checkpoint`: drawn where they are needed, many small tensors at once, from the seed and their names."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fluentllm.hub.config import config_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fluentllm.core.protocols import PackedTensor, WeightSlot

STD = 0.02
SLAB_VALUES = 1 << 27
"""Most values that are drawn at once: a model of experts has thousands of small tensors, and a draw of its own for each costs
more than the values."""
ALONE_VALUES = 1 << 23
"""A tensor of so many is drawn alone: whoever keeps it keeps no neighbours alive."""


@dataclass(slots=True)
class Slab:
    """Tensors that are drawn together, one behind the other."""

    starts: dict[str, int] = field(default_factory=dict)
    """Name → where its values begin."""
    size: int = 0


class DummyCheckpoint:
    """What the model's own slots ask for: N(0, 0.02²), ones or zeros. Unused slots stay out, and optional ones but those of the
    model's draft layers with `drafts`. Draft layers are drawn last, so that the target is the same with them and without."""

    config: Mapping[str, Any]

    def __init__(self, path: Path, slots: Iterable[WeightSlot], dtype: str, seed: int, *, drafts: bool = False) -> None:
        self.config = config_at(path)
        wanted = [slot for slot in slots if not slot.unused and (not slot.optional or (drafts and slot.drafts))]
        wanted.sort(key=lambda slot: slot.drafts)
        self._slots = {slot.name: (slot.shape, slot.init) for slot in wanted}
        self._dtype = dtype
        self._seed = seed
        self._slabs = _slabs([slot for slot in wanted if slot.init == "normal"])
        self._drawn: tuple[Slab, torch.Tensor] | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self._slots.items()}

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """In the model's dtype, drawn in place on the device; small tensors are views of what was drawn with them."""
        shape, init = self._slots[name]
        if init != "normal":
            return torch.full(shape, 1.0 if init == "ones" else 0.0, dtype=self._dtype_on(device), device=device)
        slab = self._slabs[name]
        start = slab.starts[name]
        return self._values(slab, device)[start : start + math.prod(shape)].view(shape)

    def _values(self, slab: Slab, device: torch.device) -> torch.Tensor:
        """The slab's values, drawn once for as long as its tensors are read one after the other."""
        if self._drawn is not None and self._drawn[0] is slab and self._drawn[1].device.type == device.type:
            return self._drawn[1]
        self._drawn = None  # before the next is drawn: no two at a time
        first = next(iter(slab.starts))
        generator = torch.Generator(device=device).manual_seed(zlib.crc32(f"{self._seed}:{first}".encode()))
        values = torch.empty(slab.size, dtype=self._dtype_on(device), device=device).normal_(0, STD, generator=generator)
        if len(slab.starts) > 1:
            self._drawn = slab, values
        return values

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if self._dtype == "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self._dtype]

    def packed(self, name: str) -> PackedTensor | None:
        return None

    def close(self) -> None:
        self._slots = {}
        self._drawn = None


def _slabs(slots: Iterable[WeightSlot]) -> dict[str, Slab]:
    """Name → the slab it is drawn with. A slab never holds tensors of the target and of draft layers together."""
    found: dict[str, Slab] = {}
    slab, drafts = Slab(), False
    for slot in slots:
        if slot.name in found:  # two slots, one tensor
            continue
        size = math.prod(slot.shape)
        alone = size >= ALONE_VALUES
        if alone or slab.size + size > SLAB_VALUES or slot.drafts != drafts:
            slab, drafts = Slab(), slot.drafts
        found[slot.name] = slab
        # Eight values are 16 bytes at least: kernels like aligned rows.
        slab.starts[slot.name] = slab.size
        slab.size += -(-size // 8) * 8
        if alone:
            slab = Slab()
    return found
