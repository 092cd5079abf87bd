"""What kernels and operations of one decode step must read, write and compute: estimates from shapes, for the roofline.

How it is counted, and what not: `HOW`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..core.types import ModelSpec

HOW = (
    "Bytes: every operand once, weights included; of experts the expected number of distinct ones; of the KV cache what the "
    "lengths say; of tables that are only indexed nothing. FLOPs: two a multiplication, of matrix products and attention; of "
    "the rest none. Roofline: the larger of bytes / bandwidth and FLOPs / rate, both measured here, over the time."
)
INDEXED = ("embedding", "rows", "commit", "leave", "append", "rotate", "lookup", "threshold", "sort", "plan", "draw")
"""Parts of names of kernels whose large operands are only indexed."""
LARGE = 4 << 20
"""Bytes from which an operand of an indexing kernel is a table."""


@dataclass(slots=True)
class Cost:
    bytes: float = 0.0
    flops: float = 0.0

    def add(self, other: Cost) -> None:
        self.bytes += other.bytes
        self.flops += other.flops


@dataclass(frozen=True, slots=True)
class Load:
    """The step that is looked at."""

    spec: ModelSpec
    batch: int
    rows: int
    """Tokens a sequence, drafts included."""
    length: float
    """Mean KV length of a sequence."""
    kv_bytes: int
    """Of one token in one layer's cache."""

    def attention(self) -> Cost:
        """Of one layer's decode."""
        kv, heads = self.spec.kv, self.spec.heads
        tokens = self.batch * self.length
        if kv.kind == "mla":
            width = kv.latent_dim + kv.rope_dim
            return Cost(tokens * self.kv_bytes, 2.0 * tokens * self.rows * heads * (width + kv.latent_dim))
        width = kv.head_dim + kv.v_head_dim
        return Cost(tokens * self.kv_bytes, 2.0 * tokens * self.rows * heads * width)


def of_launch(name: str, arguments: Iterable[Any], load: Load) -> Cost:
    """Of one launch of our kernel `name` with these arguments."""
    tensors = list({id(t): t for t in map(_tensor, arguments) if t is not None}.values())
    if "prefill" not in name and ("decode" in name or "attention" in name) and "rows" not in name:
        return load.attention()
    if any(part in name for part in INDEXED):
        return Cost(float(sum(t.nbytes for t in tensors if t.nbytes < LARGE)))
    experts = [t for t in tensors if t.ndim == 3 and t.nbytes >= LARGE]
    if experts:
        return _experts(experts, tensors, load)
    cost = Cost(float(sum(t.nbytes for t in tensors)))
    matrices = [t for t in tensors if t.ndim == 2 and t.shape[0] > load.batch * load.rows]
    if matrices and any(part in name for part in ("linear", "gemm", "product", "scores")):
        cost.flops = 2.0 * load.batch * load.rows * max(t.numel() for t in matrices)
    return cost


def _experts(weights: list[torch.Tensor], tensors: list[torch.Tensor], load: Load) -> Cost:
    """weights [E, out, in]; each token goes to as many as the list of choices, an integer tensor, is wide."""
    tokens = load.batch * load.rows
    choices = next((t.numel() for t in tensors if t.dtype in (torch.int32, torch.int64) and t.numel() >= tokens), tokens)
    cost = Cost(float(sum(t.nbytes for t in tensors if all(t is not w for w in weights))))
    for weight in weights:
        count = weight.shape[0]
        distinct = count * (1 - (1 - 1 / count) ** choices)
        cost.add(Cost(distinct * weight[0].nbytes, 2.0 * choices * weight[0].numel()))
    return cost


def _tensor(value: Any) -> torch.Tensor | None:
    base = getattr(value, "base", value)  # a tensor descriptor's
    return base if isinstance(base, torch.Tensor) else None


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm")


def of_product(name: str, shapes: Sequence[Sequence[int]], itemsize: int) -> Cost | None:
    """Of one of `PRODUCTS` with operands of these shapes; None for other operations. The last two matrices are multiplied."""
    if name not in PRODUCTS:
        return None
    operands = [shape for shape in shapes if len(shape) in (2, 3) and _count(shape)]
    operands = operands[1:3] if name in ("aten::addmm", "aten::baddbmm") and len(operands) > 2 else operands[:2]
    if len(operands) < 2:
        return None
    left, right = operands
    out = _count(left[:-1]) * right[-1]
    return Cost(float(itemsize * (_count(left) + _count(right) + out)), 2.0 * _count(left) * right[-1])


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured here: bytes a second that a copy reads and writes, FLOPs a second of a square matrix product."""
    import time

    on_gpu = device.type == "cuda"
    dtype, side, size = (torch.bfloat16, 8192, 1 << 30) if on_gpu else (torch.float32, 1024, 1 << 28)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def best(call: Any) -> float:
        seconds = []
        for _ in range(4):
            if on_gpu:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return {"bytes_s": 2 * size / best(lambda: target.copy_(source)), "flops_s": 2 * side**3 / best(lambda: torch.mm(a, b))}
