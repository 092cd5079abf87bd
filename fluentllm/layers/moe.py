"""The mixture-of-experts block: a float32 router, routed experts, zero experts, shared experts.

Used by Qwen3-MoE, DeepSeek and LongCat; what differs between them is in `kernels.moe.Routing` and in checkpoint names.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..core.protocols import WeightSlot
from ..kernels.block_fp8 import BLOCK, E4M3, quantise_weight
from ..kernels.fp8_weight import Fp8BlockWeight
from ..kernels.moe import Routing
from ..kernels.residual import ExpertSum, NormedRows
from ..kernels.weights import DENSE
from .mlp import MLP
from .module import Module, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..core.protocols import BuildContext, PackedTensor
    from ..kernels.moe import LiveRows
    from ..kernels.residual import Rows
    from ..kernels.weights import Weight


log = logging.getLogger("fluentllm.engine")


class Router(Module):
    """x [T, hidden] → weights [T, each] float32, ids [T, each]. Float32 throughout, whatever the model's dtype.

    `weight_name` and `bias_name` are the checkpoint's; the bias takes part in the choice only.
    """

    def __init__(self, ctx: BuildContext, weight_name: str, bias_name: str | None, hidden: int, routing: Routing) -> None:
        self.routing = routing
        self.weight_name, self.bias_name = weight_name, bias_name
        self.weight = torch.zeros(routing.total, hidden, dtype=torch.float32, device=ctx.device)
        self.bias = torch.zeros(routing.total, dtype=torch.float32, device=ctx.device) if bias_name else None
        self._ops = ctx.ops
        self._packed: Weight | None = None

    def __call__(self, x: Rows, live: LiveRows | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Third: x as a tensor, for the experts."""
        assert self._packed is not None
        if isinstance(x, NormedRows):
            logits, x = x.router_logits(self._packed)
        else:
            logits = self._ops.router_logits(x, self._packed)
        return *self._ops.route(logits, self.routing, self.bias, live), x

    def own_slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(self.weight_name, tuple(self.weight.shape), self.weight.copy_)
        if self.bias is not None and self.bias_name is not None:
            yield WeightSlot(self.bias_name, tuple(self.bias.shape), self.bias.copy_, init="zeros")

    def own_finalize(self) -> None:
        self._packed = self._ops.pack(self.weight, "float32")


class Experts(Module):
    """The routed experts' SwiGLU matrices: `<prefix>.<e>.{gate,up,down}_proj.weight`.

    Matrices that are not packed to int8 or int4 are views of two tensors, `gate_up` [E, 2 · inner, hidden] (gate rows first)
    and `down` [E, hidden, inner], as grouped products want them; else both are None. In block FP8 they are E4M3, with scales
    beside them; that needs hidden and inner to be multiples of 128. Shared experts, if the routing has them, follow: the
    checkpoint keeps them side by side in `shared`.{gate,up,down}_proj.weight.
    """

    every_row = False

    def __init__(
        self, ctx: BuildContext, prefix: str, routing: Routing, hidden: int, inner: int, shared: str = "shared_experts"
    ) -> None:
        self.prefix, self.shared_prefix = prefix, shared
        self.hidden, self.inner = hidden, inner
        self.routed, self.shared, self.zero_experts = routing.experts, routing.shared, routing.zero_experts
        self.count = self.routed + self.shared
        self.gate_up: Tensor | None = None
        self.down: Tensor | None = None
        self.gate_up_scale: Tensor | None = None
        self.down_scale: Tensor | None = None
        self._ops = ctx.ops
        self._precision = ctx.weight_precision
        self._device = ctx.device
        self._fits_fp8 = hidden % BLOCK == inner % BLOCK == 0
        if self._precision == "fp8" and not self._fits_fp8:
            log.warning("%s: %d × %d are not whole blocks of 128: kept in %s, not in FP8.", prefix, inner, hidden, ctx.dtype)
            self._precision = str(ctx.dtype).removeprefix("torch.")
        self._weights: dict[tuple[int, str], Weight] = {}
        self._arrived: dict[tuple[int, str], Tensor] = {}
        if self._precision in DENSE:
            self._make_dense(self._precision)
        elif self._precision == "fp8":
            self._make_fp8()

    def _make_dense(self, precision: str) -> None:
        dtype, device = DENSE[precision], self._device
        self.gate_up = torch.empty(self.count, 2 * self.inner, self.hidden, dtype=dtype, device=device)
        self.down = torch.empty(self.count, self.hidden, self.inner, dtype=dtype, device=device)
        for number in range(self.count):
            self._weights[number, "gate_up"] = self._ops.pack(self.gate_up[number], precision)
            self._weights[number, "down"] = self._ops.pack(self.down[number], precision)

    def _make_fp8(self) -> None:
        hidden, inner, device = self.hidden, self.inner, self._device
        self.gate_up = torch.empty(self.count, 2 * inner, hidden, dtype=E4M3, device=device)
        self.down = torch.empty(self.count, hidden, inner, dtype=E4M3, device=device)
        self.gate_up_scale = torch.ones(self.count, 2 * inner // BLOCK, hidden // BLOCK, device=device)
        self.down_scale = torch.ones(self.count, hidden // BLOCK, inner // BLOCK, device=device)
        for number in range(self.count):
            self._weights[number, "gate_up"] = Fp8BlockWeight(self.gate_up[number], self.gate_up_scale[number])
            self._weights[number, "down"] = Fp8BlockWeight(self.down[number], self.down_scale[number])

    def __call__(self, number: int, rows: Tensor) -> Tensor:
        """rows [n, hidden] → what expert `number` makes of them, [n, hidden]."""
        ops = self._ops
        inner = ops.silu_mul(ops.linear(rows, self._weights[number, "gate_up"]))
        return ops.linear(inner, self._weights[number, "down"])

    def own_slots(self) -> Iterator[WeightSlot]:
        wide, narrow = (self.inner, self.hidden), (self.hidden, self.inner)
        for number in range(self.routed):
            for name, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow)):
                yield WeightSlot(
                    join(self.prefix, str(number), name, "weight"), shape, partial(self._take, number, name),
                    partial(self._take_packed, number, name) if self._takes_fp8() else None,
                )  # fmt: skip
        if self.shared:
            width = self.shared * self.inner
            for name, shape in (
                ("gate_proj", (width, self.hidden)),
                ("up_proj", (width, self.hidden)),
                ("down_proj", (self.hidden, width)),
            ):
                yield WeightSlot(
                    join(self.shared_prefix, name, "weight"), shape, partial(self._take_shared, name),
                    partial(self._take_shared_packed, name) if self._takes_fp8() else None,
                )  # fmt: skip
        # Transformers saves matrices for LongCat's zero experts too, and never uses them.
        for number in range(self.routed, self.routed + self.zero_experts):
            for name in ("gate_proj", "up_proj"):
                yield WeightSlot(join(self.prefix, str(number), name, "weight"), wide, _refuse, optional=True, unused=True)

    def _takes_fp8(self) -> bool:
        return self._fits_fp8 and (self._precision == "fp8" or (self._precision == "packed" and self._device.type != "cpu"))

    def _take_packed(self, number: int, name: str, packed: PackedTensor) -> bool:
        if packed.kind != "fp8_block":
            return False
        if self.gate_up is None:
            self._make_fp8()
        self._put_fp8(number, name, packed.parts["q"], packed.parts["scale"])
        return True

    def _take_shared(self, name: str, tensor: Tensor) -> None:
        for number, part in enumerate(self._shares(name, tensor), self.routed):
            self._take(number, name, part)

    def _take_shared_packed(self, name: str, packed: PackedTensor) -> bool:
        if packed.kind != "fp8_block":
            return False
        parts = [self._shares(name, packed.parts[key]) for key in ("q", "scale")]
        for number, (q, scale) in enumerate(zip(*parts, strict=True), self.routed):
            self._take_packed(number, name, replace(packed, parts={"q": q, "scale": scale}))
        return True

    def _shares(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """Of a matrix, or its scales, that holds all shared experts: each one's part."""
        dim = 1 if name == "down_proj" else 0
        return tensor.chunk(self.shared, dim)

    def _put_fp8(self, number: int, name: str, q: Tensor, scale: Tensor) -> None:
        assert self.gate_up is not None
        assert self.down is not None
        assert self.gate_up_scale is not None
        assert self.down_scale is not None
        if name == "down_proj":
            self.down[number].copy_(q)
            self.down_scale[number].copy_(scale)
        else:
            first = self.inner if name == "up_proj" else 0
            self.gate_up[number, first : first + self.inner].copy_(q)
            self.gate_up_scale[number, first // BLOCK : (first + self.inner) // BLOCK].copy_(scale)

    def _take(self, number: int, name: str, tensor: Tensor) -> None:
        if self.gate_up is None and self._precision == "packed" and self._device.type != "cpu":
            self._make_dense("bfloat16")
        if self.gate_up_scale is not None:
            self._put_fp8(number, name, *quantise_weight(tensor.to(self._device)))
        elif self.gate_up is not None and self.down is not None:
            first = self.inner if name == "up_proj" else 0
            place = self.down[number] if name == "down_proj" else self.gate_up[number, first : first + self.inner]
            place.copy_(tensor)
        elif name == "down_proj":
            self._weights[number, "down"] = self._ops.pack(tensor.to(self._device), self._precision)
        else:
            self._arrived[number, name] = tensor.to(self._device, copy=True)
            if (number, "gate_proj") in self._arrived and (number, "up_proj") in self._arrived:
                both = [self._arrived.pop((number, part)).float() for part in ("gate_proj", "up_proj")]
                self._weights[number, "gate_up"] = self._ops.pack(torch.cat(both), self._precision)


class SparseMoE(Module):
    """x [T, hidden] → Σ weight · expert(x) (+ shared experts(x)), [T, hidden]. A token that is not `live` gets no experts: each
    might have to be read for it alone. Without a word of which are, all are.

    Names below `prefix`: `<router>.weight`, `<bias>` if given, `experts.<e>.…`, `shared_experts.…` if `shared_inner`.
    """

    def __init__(
        self,
        ctx: BuildContext,
        prefix: str,
        routing: Routing,
        hidden: int,
        inner: int,
        *,
        router: str = "gate",
        bias: str | None = None,
        shared_inner: int = 0,
    ) -> None:
        shared = join(prefix, "shared_experts")
        if joins_shared_experts(ctx, routing, inner, shared_inner):
            routing, shared_inner = replace(routing, shared=shared_inner // inner), 0
        self.routing = routing
        self.router = Router(ctx, join(prefix, router, "weight"), join(prefix, bias) if bias else None, hidden, routing)
        self.experts = Experts(ctx, join(prefix, "experts"), routing, hidden, inner, shared)
        self.shared = MLP(ctx, shared, hidden, shared_inner) if shared_inner else None
        self._ops = ctx.ops

    def __call__(self, x: Rows, live: LiveRows | None = None) -> Tensor:
        return self.later(x, live).tensor()

    def later(self, x: Rows, live: LiveRows | None = None) -> ExpertSum:
        weights, ids, x = self.router(x, live)
        shared = self.shared(x) if self.shared is not None else None
        return ExpertSum(self._ops, x, weights, ids, self.experts, self.routing, shared)


def joins_shared_experts(ctx: BuildContext, routing: Routing, inner: int, shared_inner: int) -> bool:
    """Can the shared experts be computed as routed ones? They must be as wide, and lie in one tensor with them."""
    together = ctx.weight_precision in (*DENSE, "fp8") or (ctx.weight_precision == "packed" and ctx.device.type != "cpu")
    fits = shared_inner > 0 and shared_inner % inner == 0 and not routing.zero_experts
    return ctx.ops.joins_shared_experts and together and fits


def _refuse(tensor: Tensor) -> None:
    raise AssertionError("an unused slot is never read")
