"""Plan the KV pool from what the machine has left, or from what the settings ask for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .core.errors import ConfigError, OutOfMemory
from .core.kv.pool import free_memory

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power for power, prefix in enumerate("kmgt", 1) for unit, base in (("b", 1000), ("ib", 1024))
}
CPU_POOL_LIMIT = 4 * 2**30
"""Largest pool that is planned on a CPU without being asked for: the machine is not ours alone."""
CPU_SHARE, GPU_SHARE = 0.4, 0.9
"""Of the free memory, after the weights are loaded."""


def parse_bytes(text: str) -> int:
    """`2GiB`, `500 MB`, `1073741824` → bytes. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"kv.memory is {text!r}.", fix="Write a size such as 2GiB or 500MB.", param="kv.memory")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def plan_pages(setting: str | None, device: torch.device, page_bytes: int, page_size: int, *, wanted: int, least: int) -> int:
    """Pages of the pool: what `kv.memory` holds, else what is free, never more than `wanted` (all slots at full length).

    Raises `OutOfMemory` where not even `least` pages (one sequence at full length) fit.
    """
    if setting is not None:
        size = parse_bytes(setting)
        pages = size // page_bytes
        if pages < least:
            raise OutOfMemory(
                f"kv.memory {setting} holds {pages} pages of {page_bytes} bytes; one full context needs {least}.",
                fix=f"Set kv.memory to {-(-least * page_bytes // 2**20)}MiB or more, or lower model.max_model_len.",
                param="kv.memory",
            )
        return min(pages, wanted)
    size = _free_bytes(device)
    pages = min(size // page_bytes, wanted)
    if pages < least:
        raise OutOfMemory(
            f"{size / 2**20:.0f} MiB are free for the KV pool; one full context needs {least * page_bytes / 2**20:.0f} MiB.",
            fix=f"Set model.max_model_len to {pages * page_size} or less, or free memory.",
            param="model.max_model_len",
        )
    return pages


def _free_bytes(device: torch.device) -> int:
    free = free_memory(device) or CPU_POOL_LIMIT
    if device.type == "cuda":
        return int(free * GPU_SHARE)
    return min(int(free * CPU_SHARE), CPU_POOL_LIMIT)
