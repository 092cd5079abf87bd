"""What this GPU can do at most, measured: the rooflines that the tables' shares are of.

Bytes move at the rate of a large copy, read and written; BF16 and FP8 products run at the rate of cuBLAS's for 8,192³. What
cannot be measured is taken to be an H100's, and said so. It takes less than a second, once a process; after compiling, since
`sweep.precompile` compiles in processes of its own only while CUDA was not used.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

COPIED_BYTES = 1 << 30
"""Of each of the two buffers: many times L2."""
BUS_BYTES = 256 << 20
SIZE = 8192


@dataclass(frozen=True, slots=True)
class Rates:
    copy: float
    """GB/s, read and written."""
    bf16: float
    """TFLOP/s."""
    fp8: float
    assumed: tuple[str, ...] = ()
    """Names of those that were not measured."""

    def floor_us(self, moved: float, bf16: float = 0.0, fp8: float = 0.0) -> float:
        """Least microseconds of `moved` bytes and so many FLOPs of each kind, the bytes under the products."""
        return max(moved / (self.copy * 1e3), bf16 / (self.bf16 * 1e6) + fp8 / (self.fp8 * 1e6))

    def share(self, us: float, moved: float, bf16: float = 0.0, fp8: float = 0.0) -> float:
        """Of the roofline: 1 is as fast as can be."""
        return self.floor_us(moved, bf16, fp8) / us

    def as_json(self) -> dict[str, object]:
        rates = {"copy_GBps": self.copy, "bf16_TFLOPs": self.bf16, "fp8_TFLOPs": self.fp8}
        return rates | {"assumed": list(self.assumed)}

    def __str__(self) -> str:
        parts = [f"copy {self.copy:,.0f} GB/s", f"BF16 {self.bf16:,.0f} TFLOP/s", f"FP8 {self.fp8:,.0f} TFLOP/s"]
        if not self.assumed:
            return f"{', '.join(parts)}, measured"
        return f"{', '.join(parts)}; NOT measured but an H100's: {', '.join(self.assumed)}"


H100 = Rates(copy=3000.0, bf16=800.0, fp8=1600.0)
"""Measured on an H100 80GB HBM3: in place of what cannot be measured."""


@cache
def here() -> Rates:
    """Of the current GPU. The first call measures them and prints them."""
    found = measure()
    print(f"shares are of: {found}", flush=True)
    return found


def measure() -> Rates:
    found, assumed = {}, []
    for name, rate in (("copy", copy_rate), ("bf16", bf16_rate), ("fp8", fp8_rate)):
        try:
            found[name] = rate()
        except Exception as error:  # too little memory, or no such products
            print(f"  {name} rate: {type(error).__name__}: {str(error)[:160]}", flush=True)
            found[name] = getattr(H100, name)
            assumed.append(name)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return Rates(**found, assumed=tuple(assumed))


def write_rows(path: Path | None, rows: Sequence[Mapping[str, Any]], rates: Rates) -> None:
    """The rows as JSON, each with the rates that its share is of; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps([{**row, "rates": rates.as_json()} for row in rows], indent=1) + "\n")


def copy_rate() -> float:
    source, target = (torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * COPIED_BYTES / _microseconds(lambda: target.copy_(source)) / 1e3


def bus_rate() -> float:
    """GB/s from pinned host memory."""
    source = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device="cuda")
    return BUS_BYTES / _microseconds(lambda: target.copy_(source, non_blocking=True)) / 1e3


def bf16_rate() -> float:
    a, b = _operands(torch.bfloat16)
    return _teraflops(lambda: a @ b)


def fp8_rate() -> float:
    a, b = _operands(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    return _teraflops(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of random numbers: a chip multiplies zeros at a higher clock."""
    a, b = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device="cuda").to(dtype) for _ in range(2))
    return a, b.t()


def _teraflops(run: Callable[[], object]) -> float:
    return 2 * SIZE**3 / _microseconds(run) / 1e6


def _microseconds(run: Callable[[], object], replays: int = 9) -> float:
    """Median."""
    for _ in range(3):
        run()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000)  # the host is ahead of the device
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)
