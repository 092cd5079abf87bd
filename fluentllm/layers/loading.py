"""Fills a model from a checkpoint: names and shapes are checked before the first byte is read, then tensor by tensor, read
ahead where the checkpoint can. On a GPU nothing waits for the device before the end.

The last step of assembly before the memory plan. Knows no format (a `Checkpoint` does) and no architecture (the model's
`WeightSlot`s do).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from ..core.protocols import Checkpoint, Model, PackedTensor, WeightSlot

NOT_WEIGHTS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias)$")
"""Buffers that old checkpoints carry and every model computes itself."""

_LISTED = 12

MOST_PARTS = 3
"""Of a `PackedTensor`."""

FP8_NAN = 0x7F
"""E4M3's only value that is not finite, with either sign."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_weights` did."""

    tensors: int
    bytes: int
    """Handed to the model, as read (dequantised, unless the model took the blocks as they are)."""
    seconds: float
    packed: int = 0
    """Tensors that were taken as blocks."""


def load_weights(model: Model, checkpoint: Checkpoint, device: torch.device) -> LoadReport:
    """Fill every slot of `model`, in file order, then `model.finalize()`.

    Raises `CheckpointError` naming all missing, extra and misshapen tensors, or the one that holds NaN or infinity.
    """
    started = time.perf_counter()
    slots = _slots_by_name(model)
    shapes = checkpoint.shapes()
    _compare(slots, shapes, tied=bool(checkpoint.config.get("tie_word_embeddings")))
    filling = _Filling(checkpoint, device)
    filling.take_packed(slots, shapes)
    filling.read_rest()
    model.finalize()
    return LoadReport(filling.tensors, filling.bytes, time.perf_counter() - started, filling.packed)


class _Filling:
    """Which slots are filled, and what is still to be read."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.tensors = self.bytes = self.packed = 0
        self._checkpoint, self._device = checkpoint, device
        self._rest: dict[str, list[WeightSlot]] = {}

    def take_packed(self, slots: Mapping[str, list[WeightSlot]], names: Iterable[str]) -> None:
        """Offer blocks to the slots that may take them; the others are left for `read_rest`."""
        used = {name: [slot for slot in slots.get(name, ()) if not slot.unused] for name in names}
        offered = [name for name, group in used.items() if any(slot.load_packed is not None for slot in group)]
        finite = FiniteSums(self._device, MOST_PARTS * len(offered))
        for name, packed in zip(offered, self._blocks(offered), strict=True):
            if packed is not None:
                for part in packed.parts.values():
                    # A reader that does not stream gives parts on the host, whatever the device.
                    if part.device.type == "cpu":
                        check_finite(name, part)
                    else:
                        finite.add(name, part)
                used[name] = [slot for slot in used[name] if not self._take_packed(packed, slot.load_packed)]
            del packed  # before the next is there
        self._rest = {name: group for name, group in used.items() if group}
        for name in finite.suspects():
            again = self._checkpoint.packed(name)
            for part in again.parts.values() if again is not None else ():
                check_finite(name, part)

    def _blocks(self, names: list[str]) -> Iterable[PackedTensor | None]:
        stream = getattr(self._checkpoint, "stream_packed", None)
        if self._device.type == "cpu" or stream is None:
            return (self._checkpoint.packed(name) for name in names)
        found: Iterable[PackedTensor | None] = stream(names, self._device)
        return found

    def _take_packed(self, packed: PackedTensor, load: Callable[[PackedTensor], bool] | None) -> bool:
        if load is None or not load(packed):
            return False
        self.tensors, self.packed = self.tensors + 1, self.packed + 1
        self.bytes += sum(part.nbytes for part in packed.parts.values())
        return True

    def read_rest(self) -> None:
        finite = FiniteSums(self._device, len(self._rest))
        tensors = self._tensors(list(self._rest))
        for (name, slots), tensor in zip(self._rest.items(), tensors, strict=True):
            if tuple(tensor.shape) != slots[0].shape:
                raise CheckpointError(f"{name} was read with shape {tuple(tensor.shape)} instead of {slots[0].shape}.")
            if self._device.type == "cpu":
                check_finite(name, tensor)
            else:
                finite.add(name, tensor)
            for slot in slots:
                slot.load(tensor)
                self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
            del tensor  # before the next is there
        for name in finite.suspects():
            check_finite(name, self._checkpoint.read(name, self._device))

    def _tensors(self, names: list[str]) -> Iterable[Tensor]:
        stream = getattr(self._checkpoint, "stream", None)
        if self._device.type == "cpu" or stream is None:
            return (self._checkpoint.read(name, self._device) for name in names)
        tensors: Iterable[Tensor] = stream(names, self._device)
        return tensors


def _slots_by_name(model: Model) -> dict[str, list[WeightSlot]]:
    """A name may have several slots (tied embeddings): each is filled from the same tensor."""
    slots: dict[str, list[WeightSlot]] = {}
    for slot in model.weight_slots():
        slots.setdefault(slot.name, []).append(slot)
    return slots


def _compare(slots: Mapping[str, list[WeightSlot]], shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    missing = [group[0] for name, group in slots.items() if name not in shapes and not all(_may_lack(slot) for slot in group)]
    extra = [name for name in shapes if name not in slots and not _ignored(name, tied=tied)]
    misshapen = [s for name in shapes for s in slots.get(name, ()) if not s.unused and tuple(shapes[name]) != tuple(s.shape)]
    if not (missing or extra or misshapen):
        return
    found = [
        _section("missing", [f"{slot.name} {list(slot.shape)}" for slot in missing]),
        _section("extra", [f"{name} {list(shapes[name])}" for name in extra]),
        _section("misshapen", [f"{s.name} {list(shapes[s.name])} instead of {list(s.shape)}" for s in misshapen]),
    ]
    raise CheckpointError(
        "The checkpoint does not fit its configuration: " + "; ".join(part for part in found if part) + ".",
        fix="Compare config.json with the weights: they may belong to different models, or the download may be incomplete.",
    )


def _may_lack(slot: WeightSlot) -> bool:
    return slot.optional or slot.unused


def _ignored(name: str, *, tied: bool) -> bool:
    """Buffers, and the copy of the embedding that some tied checkpoints carry."""
    return bool(NOT_WEIGHTS.search(name)) or (tied and name == "lm_head.weight")


def _section(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)} {what}: " + ", ".join(items[:_LISTED]) + more


def _magnitudes(tensor: Tensor) -> Tensor:
    """Bits of E4M3 values without their sign."""
    return tensor.view(torch.uint8) & FP8_NAN


class FiniteSums:
    """Looks for NaN and infinity without waiting for the device: a sum a tensor, read once at the end."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._sums = torch.zeros(count, dtype=torch.float32, device=device)
        self._names: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Another tensor, of at most `count`."""
        number = len(self._names)
        self._names.append(name)
        if tensor.dtype is torch.float8_e4m3fn:
            if tensor.numel():
                found = _magnitudes(tensor).amax() == FP8_NAN
                self._sums[number].masked_fill_(found, torch.nan)
        elif tensor.is_floating_point():
            torch.sum(tensor.reshape(-1), 0, dtype=torch.float32, out=self._sums[number])

    def suspects(self) -> list[str]:
        """Those whose sum is NaN or infinite: every tensor that holds such a value, and any whose finite values add up to
        more than float32 holds. Waits for the device."""
        return [self._names[number] for number in (~torch.isfinite(self._sums)).nonzero().flatten().tolist()]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `CheckpointError` that says how many values are NaN or infinite. One reduction, no temporary: such a value
    anywhere shows in the sum."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype is torch.float8_e4m3fn:
        bad = int((_magnitudes(tensor) == FP8_NAN).sum())
    elif torch.isfinite(tensor.sum(dtype=torch.float32)):
        bad = 0
    else:
        bad = int((~torch.isfinite(tensor)).sum())
    if not bad:
        return
    raise CheckpointError(
        f"{name} {list(tensor.shape)} holds {bad} values that are NaN or infinite.",
        fix="The file is damaged or was saved from a broken training run: fetch it again.",
    )
