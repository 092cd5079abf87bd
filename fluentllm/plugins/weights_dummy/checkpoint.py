"""Random weights as a `Checkpoint`: each tensor is drawn where it is needed, from the seed and its name."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

from fluentllm.hub.config import config_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fluentllm.core.protocols import PackedTensor, WeightSlot

STD = 0.02


class DummyCheckpoint:
    """What the model's own slots ask for: N(0, 0.02²), ones or zeros. Unused slots stay out, and optional ones but those of the
    model's draft layers with `drafts`."""

    config: Mapping[str, Any]

    def __init__(self, path: Path, slots: Iterable[WeightSlot], dtype: str, seed: int, *, drafts: bool = False) -> None:
        self.config = config_at(path)
        wanted = [slot for slot in slots if not slot.unused and (not slot.optional or (drafts and slot.drafts))]
        self._slots = {slot.name: (slot.shape, slot.init) for slot in wanted}
        self._dtype = dtype
        self._seed = seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self._slots.items()}

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """In the model's dtype, drawn in place on the device: no second copy exists at any time."""
        shape, init = self._slots[name]
        tensor = torch.empty(shape, dtype=self._dtype_on(device), device=device)
        if init == "ones":
            return tensor.fill_(1)
        if init == "zeros":
            return tensor.zero_()
        generator = torch.Generator(device=device).manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        return tensor.normal_(0, STD, generator=generator)

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if self._dtype == "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self._dtype]

    def packed(self, name: str) -> PackedTensor | None:
        return None

    def close(self) -> None:
        self._slots = {}
