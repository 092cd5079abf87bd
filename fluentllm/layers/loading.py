"""Fills a model from a checkpoint: names and shapes are checked before the first byte is read, then one tensor at a time.

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
    from collections.abc import Mapping

    from ..core.protocols import Checkpoint, Model, PackedTensor, WeightSlot

NOT_WEIGHTS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias)$")
"""Buffers that old checkpoints carry and every model computes itself."""

_LISTED = 12


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
    tensors = size = packed_count = 0
    for name in shapes:
        for slot in slots.get(name, ()):
            if slot.unused:
                continue
            packed = checkpoint.packed(name) if slot.load_packed is not None else None
            if packed is not None and slot.load_packed is not None:
                _check_packed(name, packed)
                if slot.load_packed(packed):
                    tensors, packed_count = tensors + 1, packed_count + 1
                    size += sum(part.nbytes for part in packed.parts.values())
                    continue
            tensor = checkpoint.read(name, device)
            if tuple(tensor.shape) != slot.shape:
                raise CheckpointError(f"{name} was read with shape {tuple(tensor.shape)} instead of {slot.shape}.")
            _check_finite(name, tensor)
            slot.load(tensor)
            tensors, size = tensors + 1, size + tensor.nbytes
            del tensor
    model.finalize()
    return LoadReport(tensors, size, time.perf_counter() - started, packed_count)


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


def _check_packed(name: str, packed: PackedTensor) -> None:
    for part in packed.parts.values():
        _check_finite(name, part)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """One reduction, no temporary: a NaN or infinity anywhere shows in the sum."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all():
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise CheckpointError(
        f"{name} {list(tensor.shape)} holds {bad} values that are NaN or infinite.",
        fix="The file is damaged or was saved from a broken training run: fetch it again.",
    )
