"""Deterministic mode: every operation gives a row the same bits, whatever other rows there are and wherever it stands.

Products run over tiles of a fixed number of rows, the last one filled up with zeros, so that the library sees one shape
only; what is left of elementwise work runs over pieces of a fixed length. Slower than `plain`, which the tests compare with.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .plain import PlainOps, partner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from .ops import Ops
    from .weights import Weight

TILE = 8
"""Rows of one product."""
PIECE = 16384
"""Values of one elementwise call: below torch's border (32,768) of splitting work among threads, and a multiple of every
vector width, so that no value is computed by the scalar code for left-overs, whose last bits may differ."""


class FixedOrderOps(PlainOps):
    """`Ops` whose rows do not depend on each other, nor on how many there are."""

    deterministic = True

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        y = tiled(lambda tile: weight.product(tile, None), x)
        return y if bias is None else y + bias

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([tiled(w.__rmatmul__, rows) for rows, w in zip(a, b, strict=True)])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        # The mean's order of summation is fixed by the width, as long as no single row is split among threads.
        mean = ordered_row_sum(wide * wide) / x.shape[-1]
        return (wide * torch.rsqrt(mean.unsqueeze(-1) + eps)).to(x.dtype) * weight

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(delta), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return in_pieces(F.silu, gate) * up

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        width = cos.shape[-1]
        rotated = x[..., :width]
        # Not addcmul: its vector and scalar code may round differently.
        out = rotated * cos + partner(rotated, interleaved) * sin
        return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), -1)


def slowdown(matrices: Iterable[Weight], rows: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds that one product of `rows` rows with each of the matrices takes on the device, plain and in fixed order."""
    from . import choose_ops

    matrices = list(matrices)
    inputs = {m.in_features: torch.randn(rows, m.in_features, dtype=dtype, device=device) for m in matrices}

    def every(ops: Ops) -> None:
        for matrix in matrices:
            ops.linear(inputs[matrix.in_features], matrix)

    time_of = _seconds_on_gpu if device.type == "cuda" else _seconds
    plain, fixed = (time_of(partial(every, choose_ops(device, deterministic))) for deterministic in (False, True))
    return plain, fixed


def _seconds(work: Callable[[], None]) -> float:
    work()  # warms up
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _seconds_on_gpu(work: Callable[[], None]) -> float:
    """In a CUDA graph, as steps are: launching one by one would take the host longer than the device."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    started, stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compiles
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        work()
        graph.capture_end()
        graph.replay()
        started.record()
        graph.replay()
        stopped.record()
    stopped.synchronize()
    return float(started.elapsed_time(stopped)) / 1e3


def tiled(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) in tiles of `TILE` rows; x [T, in] → [T, out]."""
    rows = x.shape[0]
    if rows == 0:
        return product(x.new_zeros(TILE, x.shape[1]))[:0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE))
    # Each tile gets storage of its own: a library may choose its path by the operand's address.
    return torch.cat([product(tile.clone()) for tile in padded.split(TILE)])[:rows]


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) elementwise, in pieces of `PIECE` values."""
    flat = x.reshape(-1)
    if not flat.numel():
        return torch.empty_like(x)
    padded = F.pad(flat, (0, -flat.numel() % PIECE))
    return torch.cat([function(piece.clone()) for piece in padded.split(PIECE)])[: flat.numel()].view(x.shape)


def ordered_row_sum(x: Tensor) -> Tensor:
    """x [..., n] → [...]: the same order of additions in each row, whatever the other dimensions are.

    Halves are added to each other until one value is left: elementwise additions alone, each correctly rounded.
    """
    width = x.shape[-1]
    size = 1 << max(0, (width - 1).bit_length())
    x = F.pad(x, (0, size - width))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]
