"""Plan the KV pool from what the machine has left beside weights and workspace, or from what the settings ask for.

On a GPU nothing is guessed: the pool is sized while the largest steps' memory is taken (`rehearsal.py`), up to
`engine.memory_share` of the card. Errors name the numbers and a setting that fits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .core.errors import ConfigError, OutOfMemory
from .core.kv.pool import free_memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from .core.protocols import WeightSlot

_UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power for power, prefix in enumerate("kmgt", 1) for unit, base in (("b", 1000), ("ib", 1024))
}
CPU_POOL_LIMIT = 4 * 2**30
"""Largest pool that is planned on a CPU without being asked for: the machine is not ours alone."""
CPU_SHARE = 0.4
"""Of the free memory, after the weights are loaded."""
MOST_SHARE = 0.97
"""Of a GPU's memory, that an error will advise: the driver wants some."""
GIB = 2**30


def parse_bytes(text: str) -> int:
    """`2GiB`, `500 MB`, `1073741824` → bytes. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"kv.memory is {text!r}.", fix="Write a size such as 2GiB or 500MB.", param="kv.memory")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True)
class Room:
    """What a device has for the KV pool."""

    free: int
    """Bytes that could be allocated while the largest steps run."""
    total: int = 0
    """Bytes of the GPU; 0 on a CPU, where `free` is all that counts."""
    workspace: int = 0
    """Bytes that the largest steps take, graphs included."""
    share: float = 1.0
    """`engine.memory_share`."""
    smaller: str = ""
    """Settings with which smaller steps leave enough for one context, where these do not; empty: none are known."""

    @property
    def usable(self) -> int:
        """Bytes for the pool."""
        return max(0, self.free - int((1 - self.share) * self.total))


def room_on_cpu(device: torch.device) -> Room:
    free = free_memory(device) or CPU_POOL_LIMIT
    return Room(min(int(free * CPU_SHARE), CPU_POOL_LIMIT))


def plan_pages(setting: str | None, room: Room, page_bytes: int, page_size: int, *, wanted: int, least: int) -> int:
    """Pages of the pool: what `kv.memory` holds, else what `room` has, never more than `wanted` (all slots at full length).

    Raises `OutOfMemory` where not even `least` pages (one sequence at full length) fit.
    """
    if setting is not None:
        pages = parse_bytes(setting) // page_bytes
        if pages < least:
            raise OutOfMemory(
                f"kv.memory {setting} holds {pages} pages of {page_bytes} bytes; one full context needs {least}.",
                fix=f"Set kv.memory to {-(-least * page_bytes // 2**20)}MiB or more, or lower model.max_model_len.",
                param="kv.memory",
            )
        return min(pages, wanted)
    # The scratch page counts too.
    pages = min(room.usable // page_bytes - 1, wanted)
    if pages < least:
        raise _too_small(room, page_bytes, page_size, max(0, pages), least)
    return pages


def _too_small(room: Room, page_bytes: int, page_size: int, pages: int, least: int) -> OutOfMemory:
    """For one full context."""
    needed = (least + 1) * page_bytes
    message = f"{_size(room.usable)} are free for the KV pool; one full context needs {_size(needed)}."
    fixes = []
    if room.total:
        used = room.total - room.free - room.workspace
        message += (
            f" The GPU has {_size(room.total)}: {_size(used)} are taken by weights, tables and other processes, "
            f"{_size(room.workspace)} by the largest step, and engine.memory_share is {room.share}."
        )
        share = 1 - (room.free - needed) / room.total
        if share <= MOST_SHARE:
            fixes.append(f"engine.memory_share to {-(-share * 1000 // 10) / 100:.2f}")
    if pages:
        fixes.append(f"model.max_model_len to {pages * page_size} or less")
    if room.smaller:
        fixes.append(room.smaller)
    fix = f"Set {', or '.join(fixes)}, or free memory." if fixes else "Free memory on the device, or choose a smaller model."
    return OutOfMemory(message, fix=fix, param="model.max_model_len")


def weights_too_large(
    slots: Iterable[WeightSlot] | None, device: torch.device, dtype: torch.dtype, error: BaseException
) -> OutOfMemory:
    """For memory that ran out while a model was made or filled. `slots`: what it is made of, where that is known."""
    needed = weight_bytes(slots, dtype) if slots is not None else 0
    name = str(dtype).removeprefix("torch.")
    what = f"The weights need about {_size(needed)} in {name}" if needed else "The weights do not fit"
    if device.type != "cuda":
        fix = "Free memory, or choose a smaller model, or a smaller model.weight_precision."
        return OutOfMemory(f"{what}: {error}.", fix=fix, param="model.name")
    import torch

    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # ours, and given back now
    message = f"{what}, but {_size(free)} of the {_size(total)} of {device} ({torch.cuda.get_device_name(device)}) are free."
    fixes = []
    for index in range(torch.cuda.device_count()):
        if needed and index != (device.index or 0) and torch.cuda.mem_get_info(index)[0] > needed:
            fixes.append(f"Set engine.device to cuda:{index}, which has room")
    if needed and needed < total:
        fixes.append("End the other processes on this GPU")
    fixes.append("Choose a smaller model, or one whose checkpoint has FP8 weights")
    return OutOfMemory(message, fix=f"{'; or: '.join(fixes)}.", param="engine.device")


def weight_bytes(slots: Iterable[WeightSlot], dtype: torch.dtype) -> int:
    """Of all that must be there, kept in `dtype`."""
    sizes: dict[str, int] = {}
    for slot in slots:
        if not (slot.unused or slot.optional):
            count = 1
            for side in slot.shape:
                count *= side
            sizes[slot.name] = count
    return sum(sizes.values()) * dtype.itemsize


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
