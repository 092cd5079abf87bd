"""Plan the KV pool from what the machine has left beside weights and workspace, or from what the settings ask for.

On a GPU nothing is guessed: the pool is sized while the largest steps' memory is taken (`rehearsal.py`), up to
`engine.memory_share` of the card. Errors name the numbers and a setting that fits.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .core.errors import ConfigError, OutOfMemory
from .core.kv.pool import free_memory
from .core.settings import LEAST_CONTEXT
from .core.slots import context_of

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
STEADY_SHARE = 0.9
"""Of what is free now, that an error will advise: at the next start it is a little less."""
MIB, GIB = 2**20, 2**30


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
    """Bytes of the GPU; 0 on a CPU."""
    workspace: int = 0
    """Bytes that the largest steps take, graphs included."""
    share: float = 1.0
    """`engine.memory_share`."""
    smaller: str = ""
    """Settings with which smaller steps leave enough for one context, where these do not; empty: none are known."""
    limit: int | None = None
    """Most bytes for a pool that nobody asked for."""

    @property
    def usable(self) -> int:
        """Bytes for a pool that nobody asked for."""
        below = max(0, self.free - int((1 - self.share) * self.total))
        return below if self.limit is None else min(below, self.limit)


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What the pool is made of."""

    page_bytes: int
    """Of one page, over all pools and what a proposer keeps."""
    page_size: int
    """Tokens of one page."""
    wanted: int
    """Pages of all slots at full length."""
    least: int
    """Pages of one sequence at full length."""
    drafts: int = 0
    """Most drafts of a step: a sequence's pages hold them too."""

    def fits(self, free: float) -> int:
        """Pages that so many bytes are enough for, beside the scratch page."""
        return max(0, int(free) // self.page_bytes - 1)

    def setting(self, pages: int, most: int) -> str:
        """`kv.memory` for so many pages or a few more, at most `most`: in whole MiB where that can be."""
        whole = -(-pages * self.page_bytes // MIB)
        return f"{whole}MiB" if whole * MIB // self.page_bytes <= most else str(pages * self.page_bytes)

    def shorter(self, pages: int) -> list[str]:
        """What to set so that one context needs no more than so many pages; empty: it would be none."""
        context = context_of(pages, self.drafts, self.page_size)
        return [f"model.max_model_len to {context} or less"] if context >= LEAST_CONTEXT else []


def room_on_cpu(device: torch.device) -> Room:
    free = free_memory(device)
    limit = int(free * CPU_SHARE) if free is not None else CPU_POOL_LIMIT
    return Room(free if free is not None else sys.maxsize, limit=min(limit, CPU_POOL_LIMIT))


def plan_pages(setting: str | None, room: Room, shape: PoolShape) -> int:
    """Pages of the pool: what `kv.memory` holds, else what `room` has, never more than all slots need at full length.

    Raises `OutOfMemory` where not even one sequence at full length fits, or what is asked for does not.
    """
    if setting is None:
        pages = min(shape.fits(room.usable), shape.wanted)
        if pages < shape.least:
            raise _too_little_room(room, shape, pages)
        return pages
    held = parse_bytes(setting) // shape.page_bytes
    pages = min(held, shape.wanted)
    if held < shape.least or pages > shape.fits(room.free):
        raise _wrong_size(setting, held, room, shape)
    return pages


def _wrong_size(setting: str, held: int, room: Room, shape: PoolShape) -> OutOfMemory:
    """For a `kv.memory` that is too small for one context, or too large for the device."""
    most, least = shape.fits(room.free), shape.least
    message = f"kv.memory {setting} holds {held} pages of {shape.page_bytes} bytes; one full context needs {least}"
    if max(held, least) > most:
        message += f", and {_size(room.free)} are free, enough for {most} and the scratch page"
    advised = shape.fits(room.free * STEADY_SHARE)
    param = "kv.memory"
    if held < least <= most:
        fixes = [f"kv.memory to {shape.setting(least, most)} or more", *shape.shorter(held)]
    elif least <= most:
        fixes = [f"kv.memory to {shape.setting(max(least, advised), most)}"]
    else:
        fixes, param = shape.shorter(min(held, advised)), "model.max_model_len"
        if held > most:
            fixes = [f"{fix} and kv.memory to {shape.setting(advised, most)}" for fix in fixes]
    return OutOfMemory(f"{message}.", fix=_advice(fixes), param=param)


def _too_little_room(room: Room, shape: PoolShape, pages: int) -> OutOfMemory:
    """For one full context, where nothing is asked for."""
    needed = (shape.least + 1) * shape.page_bytes
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
    elif shape.least <= (most := shape.fits(room.free * STEADY_SHARE)):
        fixes.append(f"kv.memory to {shape.setting(shape.least, most)}")
    fixes += shape.shorter(pages)
    if room.smaller:
        fixes.append(room.smaller)
    return OutOfMemory(message, fix=_advice(fixes), param="model.max_model_len")


def _advice(fixes: list[str]) -> str:
    return f"Set {', or '.join(fixes)}, or free memory." if fixes else "Free memory on the device, or choose a smaller model."


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
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
