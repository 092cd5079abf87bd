"""How every kernel here is launched: one door, so that the compile check sees exactly what launchers ask for.

`recording()` collects launches instead of making them; `compile.py` turns them into machine code without a GPU.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .cache_key import settle_key
from .relaunch import relaunch

if TYPE_CHECKING:
    from collections.abc import Iterator

HOPPER_MULTIPROCESSORS = 132
"""Of an H100 SXM; what launchers plan for where there is no device to ask."""


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: Any
    """The `triton.jit` function."""
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    """By position."""
    options: dict[str, Any]
    """`tl.constexpr` parameters by name, `num_warps`, `num_stages`, `launch_pdl`."""


class _Recorder(threading.local):
    launches: list[Launch] | None = None
    """Where this thread's launches are collected."""
    run: bool = False
    """Make them all the same."""


_recorder = _Recorder()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the current stream, as `kernel[grid](*args, **options)` does; nothing for an empty grid."""
    recorded = _recorder.launches
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, options))
    if 0 not in grid and (recorded is None or _recorder.run):
        relaunch(kernel, grid, args, options)


def compile_ahead(launch: Launch) -> Any:
    """What this launch would run, compiled or out of the cache, without launching it. Raises what the compiler raises."""
    settle_key(launch.kernel)
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


@contextmanager
def recording(*, run: bool = False) -> Iterator[list[Launch]]:
    """Inside, this thread's launches are collected, and nothing runs unless told to."""
    before = _recorder.launches, _recorder.run
    launches: list[Launch] = []
    _recorder.launches, _recorder.run = launches, run
    try:
        yield launches
    finally:
        _recorder.launches, _recorder.run = before


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; an H100's elsewhere."""
    if device.type != "cuda":
        return HOPPER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps(device: torch.device) -> bool:
    """May launches on this device be programmatic (`launch_pdl`)? From compute capability 9.0 on, and in the compile check."""
    if triton.knobs.runtime.interpret or device.type not in ("cuda", "meta"):
        return False
    return device.type == "meta" or torch.cuda.get_device_capability(device) >= (9, 0)


START_NEXT = {"small": 1, "product": 1, "few experts": 1, "experts": 1}
"""Where a kernel lets the next one start, by its kind: 1 `language.FIRST`, 2 `language.LOADED`, 3 nowhere (when it has
ended), 0: launched normally.

small: a few rows, done in a microsecond or two. product: fills the chip and holds most of its shared memory; whoever is placed
while it runs is placed where there happens to be room. few experts: one or two tokens' products with them. experts: the
products of more, many times as many programs as there are places. benchmarks/kernels/launches.py measures it; NOTES.md there
has what was seen."""


EARLY = {"small": True, "product": True, "few experts": True, "experts": False}
"""May a kernel of a kind be set up while the one in front of it still runs, where that one lets it? False: it is launched
normally, and only its own successor may come early: programs of `experts` would take the places of those that still work."""


def programmatic(device: torch.device, kind: str = "small") -> dict[str, Any]:
    """Options of a kernel with a parameter `PDL` that calls `language.start_next` at each place, and `language.wait_for_inputs`
    before it touches anything that another kernel writes, or writes anything itself. `kind`: of `START_NEXT`."""
    place = START_NEXT[kind] if overlaps(device) else 0
    return {"PDL": place, "launch_pdl": EARLY[kind]} if place else {"PDL": 0}


@cache
def _has_tma(device: torch.device) -> bool:
    """From compute capability 9.0 on, and where there is no device to ask."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def bulk_copies(tensor: torch.Tensor) -> bool:
    """Can TMA read this matrix [rows, columns]? Rows must be contiguous inside and 16 bytes aligned."""
    width = tensor.element_size()
    if not _has_tma(tensor.device):
        return False
    aligned = tensor.data_ptr() % 16 == 0 and (tensor.stride(0) * width) % 16 == 0
    return tensor.stride(1) == 1 and aligned and 0 not in tensor.shape


def descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For TMA, of a matrix, in boxes of rows × columns. Reading outside gives zeros."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two, the second 0 or at least 16, that cover a head's width with less padding than one would: tiles' sizes
    are powers of two, and 96 = 64 + 32, 192 = 128 + 64."""
    whole = max(16, power_of_2(width))
    main = whole // 2
    rest = max(16, power_of_2(width - main))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)


def power_of_2(n: int) -> int:
    """The least power of two ≥ n, at least 1."""
    return 1 << max(0, n - 1).bit_length()
