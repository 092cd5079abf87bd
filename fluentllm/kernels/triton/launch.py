"""How every kernel here is launched: one door, so that the compile check sees exactly what launchers ask for.

`recording()` collects launches instead of making them; `compile.py` turns them into machine code without a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

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
    """`tl.constexpr` parameters by name, `num_warps`, `num_stages`."""


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the current stream; nothing for an empty grid."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
    elif 0 not in grid:
        kernel[grid](*args, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are collected and nothing runs. For tests: not safe for threads."""
    global _recorded  # noqa: PLW0603 - the hook belongs to the process, as the device does
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; an H100's elsewhere."""
    if device.type != "cuda":
        return HOPPER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


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
