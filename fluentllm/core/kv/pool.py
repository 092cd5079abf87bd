"""The pool tensors: where the KV of all pages lies, one tensor a kind of value, indexed by layer and page number.

Allocated once by the executor, after weights and workspace have been measured; attention backends write and read it at
the pages that `KVCache` hands out. Page 0 is scratch: inert rows write there, and what is read there must be finite.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import OutOfMemory
from .formats import quantised_latents, token_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import KVSpec

MIB = 1024 * 1024


class KVPool:
    """KV of pages 0 … `pages`, zeros at first.

    kind gqa: `k` [layers, pages + 1, page_size, heads, head_dim], `v` [layers, pages + 1, page_size, heads, v_head_dim].
    kind mla: `latent` [layers, pages + 1, page_size, latent_dim + rope_dim], the latent first, then the rotary key; in
    float8_e4m3fn uint8 [layers, pages + 1, page_size, bytes of a token], each page being planes (`formats.latent_planes`).
    The tensors of the other kind have no elements. Raises `OutOfMemory` if the device has no room.
    """

    def __init__(self, spec: KVSpec, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.pages = pages
        """Usable pages; the tensors have one more."""
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.bytes = (pages + 1) * self.bytes_per_page(spec, page_size, dtype)
        free = free_memory(device)
        if free is not None and self.bytes > free:
            raise self._out_of_memory(free)
        grid = (spec.layers, pages + 1, page_size)
        shapes: dict[str, tuple[int, ...]] = {"k": (0,), "v": (0,), "latent": (0,)}
        kept = dtype
        if quantised_latents(spec.kind, _name(dtype)):
            shapes["latent"], kept = (*grid, token_bytes(spec, _name(dtype))), torch.uint8
        elif spec.kind == "mla":
            shapes["latent"] = (*grid, spec.latent_dim + spec.rope_dim)
        else:
            shapes["k"] = (*grid, spec.heads, spec.head_dim)
            shapes["v"] = (*grid, spec.heads, spec.v_head_dim)
        try:
            tensors = {name: _zeros(shape, kept, device) for name, shape in shapes.items()}
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise self._out_of_memory(free) from error
        self.k: Tensor = tensors["k"]
        self.v: Tensor = tensors["v"]
        self.latent: Tensor = tensors["latent"]

    @staticmethod
    def bytes_per_page(spec: KVSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return spec.layers * page_size * token_bytes(spec, _name(dtype))

    def rows(self, layer: int) -> tuple[Tensor, ...]:
        """The layer's tensors seen as token rows: row page × page_size + offset. gqa: (k, v), each
        [(pages + 1) · page_size, heads, dim]; mla: (latent,), [(pages + 1) · page_size, latent_dim + rope_dim], but no such
        rows in float8_e4m3fn. Views: writing to them writes to the pool."""
        assert not quantised_latents(self.spec.kind, _name(self.dtype)), "pages of planes have no rows"
        if self.spec.kind == "mla":
            return (self.latent[layer].flatten(0, 1),)
        return self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)

    def _out_of_memory(self, free: int | None) -> OutOfMemory:
        page = self.bytes_per_page(self.spec, self.page_size, self.dtype)
        message = (
            f"The KV pool of {self.pages} pages of {self.page_size} tokens needs {_mib(self.bytes)} "
            f"({page:,} bytes a page, {self.dtype}) on {self.device}"
        )
        if free is None:
            return OutOfMemory(f"{message}, which could not be allocated.", fix="Set kv.memory to less.")
        message += f", where {_mib(free)} is free."
        # Beside the scratch page. A tenth is left for what is allocated beside the pool and cannot be seen from here.
        fits = free * 9 // 10 - page
        if fits < page:
            return OutOfMemory(message, fix="Not even one page fits: free memory on the device, or choose a smaller model.")
        return OutOfMemory(message, fix=f"Set kv.memory to {f'{fits // MIB}MiB' if fits >= page + MIB else fits} or less.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    # The kernel hands out zero pages as they are touched; torch.zeros would write all of the pool at start.
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device now; None where that cannot be known. On a CPU the kernel's estimate,
    within the limits of a container (cgroup v2)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has cached and not given out can be reused.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    available = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if available is None:
        return None
    left = _left_in_group(Path("/sys/fs/cgroup"))
    return available * 1024 if left is None else min(available * 1024, left)


def _left_in_group(group: Path) -> int | None:
    """Bytes below the control group's limit, file cache not counted; None without a limit."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except OSError:
        return None
    if limit == "max":
        return None
    stat = _fields(group / "memory.stat")
    cache = stat.get("active_file", 0) + stat.get("inactive_file", 0)
    return max(0, int(limit) - max(0, used - cache))


def _fields(file: Path) -> dict[str, int]:
    """`name: number …` lines, as the kernel writes them."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
