"""What kernels and operations of one decode step must read, write and compute: estimates from shapes, for the roofline.

How it is counted, and what not: `HOW`.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.kv.pool import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..core.types import ModelSpec
    from ..kernels.moe import Routing

HOW = (
    "Bytes: every operand once, weights included; of experts the expected number of distinct ones, zero experts having no "
    "weights, and rows of drafts that nobody left no experts; of the KV cache what the lengths say; of tables that are only "
    "indexed nothing. FLOPs: two a multiplication, of matrix products and attention; of the rest none. Roofline: the larger of "
    "bytes / bandwidth and FLOPs / rate, both measured here, over the time."
)
INDEXED = (
    "embedding", "gather", "draft_input", "rows", "commit", "leave", "shift", "append", "rotate", "lookup", "sort", "plan"
)  # fmt: skip
"""Parts of names of kernels whose large operands are only indexed."""
LARGE = 4 << 20
"""Bytes from which an operand of an indexing kernel is a table."""
EXPERTS = ("_gate_up_kernel", "_down_kernel", "_grouped_kernel", "_stream_kernel", "_persistent_kernel")
"""Kernels that multiply by experts' matrices; the matrices are their largest operand."""
MULTIPLIES = ("linear", "held", "gemm", "scores")
"""Parts of names of kernels that multiply two matrices, x [T, K] and W [N, K]."""


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
    routing: Routing | None = None
    """Of the layers with experts; None: there are none."""
    needed: float | None = None
    """Tokens a sequence that somebody needs, on average: of drafts those that were left. None: all rows."""

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
    if "absorb" in name:
        return _absorbed(tensors, load.spec)
    if load.routing is not None and name in EXPERTS:
        return _experts(tensors, load.routing, load)
    cost = Cost(float(sum(t.nbytes for t in tensors)))
    if any(part in name for part in MULTIPLIES):
        cost.flops = 2.0 * _multiplications(tensors)
    return cost


def _absorbed(tensors: list[torch.Tensor], spec: ModelSpec) -> Cost:
    """MLA's queries by the matrices of their heads [H, nope, latent], and keys left in the cache, at places that are the only
    int64."""
    weight = spec.heads * spec.kv.nope_dim * spec.kv.latent_dim
    tokens = next(t.numel() for t in tensors if t.dtype is torch.int64)
    return Cost(float(sum(t.nbytes for t in tensors if t.numel() == weight or t.nbytes < LARGE)), 2.0 * tokens * weight)


def _experts(tensors: list[torch.Tensor], routing: Routing, load: Load) -> Cost:
    """Weights are [E, out, in] or, as TMA reads them, [E · out, in], scales [E, …]; the first integers are the choices, or the
    pairs in another order: as many as the tokens have experts. In a pass of all rows those that nobody needs have none."""
    count = routing.experts + routing.shared
    weight = max(tensors, key=lambda t: t.numel())
    of_experts = [t for t in tensors if t is weight or (t.ndim == 3 and t.shape[0] == count)]
    tokens = next(t.numel() for t in tensors if t.dtype in (torch.int32, torch.int64)) / routing.each
    if load.needed is not None and tokens == load.batch * load.rows:
        tokens = load.batch * load.needed
    shares = distinct_experts(routing, tokens) / count
    pairs = tokens * (routing.top_k * routing.experts / routing.total + routing.shared)
    beside = sum(t.nbytes for t in tensors if all(t is not other for other in of_experts))
    return Cost(beside + shares * sum(t.nbytes for t in of_experts), 2.0 * pairs * weight.numel() / count)


def distinct_experts(routing: Routing, tokens: float) -> float:
    """Experts with weights that at least one of `tokens` tokens is expected to have: each chooses `top_k` different ones of
    all, any being as likely as another, zero experts among them; shared ones are everybody's."""
    missed = (1 - routing.top_k / routing.total) ** tokens
    return routing.experts * (1 - missed) + (routing.shared if tokens else 0)


def _multiplications(tensors: list[torch.Tensor]) -> int:
    """Of x [T, K] by W [N, K]: T · N · K. What else the product reads and writes has T rows of N, or is small."""
    pairs = itertools.combinations([t for t in tensors if t.ndim == 2], 2)
    return max((a.numel() * b.shape[0] for a, b in pairs if a.shape[1] == b.shape[1]), default=0)


def _tensor(value: Any) -> torch.Tensor | None:
    base = getattr(value, "base", value)  # a tensor descriptor's
    return base if isinstance(base, torch.Tensor) else None


PRODUCTS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::_scaled_mm": 0, "aten::_scaled_mm_v2": 0
}  # fmt: skip
"""Operations of torch that multiply two matrices → the first one's place among the arguments; the second follows."""


def of_product(name: str, shapes: Sequence[Sequence[int]], itemsize: int) -> Cost | None:
    """Of one of `PRODUCTS` with arguments of these shapes; None for other operations. `itemsize`: bytes of a value, of what
    scaled products read one."""
    if name not in PRODUCTS:
        return None
    left, right = shapes[PRODUCTS[name] :][:2]
    if len(left) not in (2, 3) or len(right) not in (2, 3):
        return None
    out = _count(left[:-1]) * right[-1]
    read = (1 if "scaled" in name else itemsize) * (_count(left) + _count(right))
    return Cost(float(read + itemsize * out), 2.0 * _count(left) * right[-1])


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured here: bytes a second that a copy reads and writes, FLOPs a second of a square matrix product."""
    dtype, side = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return {"bytes_s": copy_rate(device), "flops_s": 2 * side**3 / _best(lambda: torch.mm(a, b), device)}


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy within this device reads and writes, measured now."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28
    free = free_memory(device)
    # Beside an engine there may be little left, and it may want it later, in a capture.
    source, target = torch.ones(2, size if free is None else min(size, free // 4), dtype=torch.uint8, device=device)
    rate = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    if device.type == "cuda":
        del source, target
        torch.cuda.empty_cache()
    return rate


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that it takes, on a GPU without the host's part."""
    times = 4 if device.type == "cuda" else 1
    seconds = []
    for _ in range(4):
        _finish(device)
        started = time.perf_counter()
        for _ in range(times):
            call()
        _finish(device)
        seconds.append((time.perf_counter() - started) / times)
    return min(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
