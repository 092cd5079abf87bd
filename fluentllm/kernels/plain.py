"""The tensor operations in eager torch, on any device: few calls a layer, no regard to the order of sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .moe import combine, route
from .ngram import ngram_ids
from .residual import NormedRows, linear_plus
from .weights import Weight, copy_bytes, pack, pack_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .moe import LiveRows, Routing
    from .native.library import Library
    from .ngram import NgramTables
    from .ops import ExpertWeights
    from .residual import ExpertSum, Rows


class PlainOps:
    """`Ops` for speed."""

    deterministic = False
    joins_shared_experts = False

    def __init__(self, copy_budget: int = 0, library: Library | None = None) -> None:
        """Packed matrices get a second copy for many rows until `copy_budget` bytes are used up. `library`: for products of
        few rows."""
        self._copy_budget = copy_budget
        self._library = library
        self._eps: dict[tuple[float, torch.device], Tensor] = {}

    def pack(self, weight: Tensor, precision: str) -> Weight:
        return self._count(pack(weight, precision, twice=2 * weight.numel() <= self._copy_budget, library=self._library))

    def pack_blocks(self, kind: str, parts: Mapping[str, Tensor], precision: str) -> Weight | None:
        twice = 2 * parts["q"].numel() <= self._copy_budget
        packed = pack_blocks(kind, parts, precision, twice=twice, library=self._library)
        return packed if packed is None else self._count(packed)

    def _count(self, weight: Weight) -> Weight:
        self._copy_budget -= copy_bytes(weight)
        return weight

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return weight.product(x, bias)

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return self.silu_mul(self.linear(x, weight, bias))

    def logits(self, hidden: Tensor, weight: Weight) -> Tensor:
        return self.linear(hidden, weight).float()

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype is not torch.float32 or x.device.type != "cpu":
            return F.rms_norm(x, weight.shape, weight, eps)
        # On a CPU F.rms_norm is six calls of general kernels; these five are twice as fast.
        norm = torch.linalg.vector_norm(x, 2, -1, True)
        inverse = torch.addcmul(self._epsilon(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * inverse).mul_(weight)

    def _epsilon(self, eps: float, device: torch.device) -> Tensor:
        tensor = self._eps.get((eps, device))
        if tensor is None:
            tensor = self._eps[eps, device] = torch.tensor(eps, dtype=torch.float32, device=device)
        return tensor

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(delta), weight, eps)

    def linear_add_rms_norm(
        self, x: Tensor, weight: Weight, other: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> Rows:
        return self.add_rms_norm(linear_plus(self, x, weight, other), residual, norm, eps)

    def linear_rms_norm(self, x: Rows, weight: Weight, bias: Tensor | None, norm: Tensor, eps: float) -> tuple[Rows, Tensor]:
        y = x.linear(weight, bias) if isinstance(x, NormedRows) else self.linear(x, weight, bias)
        return self.rms_norm(y[:, : norm.shape[0]], norm, eps), y[:, norm.shape[0] :]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        width = cos.shape[-1]
        rotated = x if width == x.shape[-1] else x[..., :width]
        out = rotated * cos
        if interleaved:
            out.addcmul_(partner(rotated, interleaved), sin)
        else:
            half = width // 2
            out[..., :half].addcmul_(rotated[..., half:], sin[..., :half])
            out[..., half:].addcmul_(rotated[..., :half], sin[..., half:])
        return out if rotated is x else torch.cat((out, x[..., width:]), -1)

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table)

    def draft_input(
        self,
        tokens: Tensor,
        positions: Tensor,
        table: Tensor,
        hidden: Tensor,
        token_norm: Tensor,
        hidden_norm: Tensor,
        eps: float,
    ) -> Tensor:
        hidden = torch.where((positions == 0).unsqueeze(1), 0.0, hidden)
        words = self.rms_norm(self.embedding(tokens, table), token_norm, eps)
        return torch.cat((words, self.rms_norm(hidden, hidden_norm, eps)), -1)

    def ngram_embedding(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        history: Tensor,
        ngram: NgramTables,
        words: Tensor,
        projection: Weight,
    ) -> Tensor:
        ids = ngram_ids(tokens, positions, slots, history, ngram.stops, ngram.factors, ngram.moduli) + ngram.starts
        # Of tables in host memory the rows are copied over, and the pass waits for the ids.
        rows = self.embedding(ids.to(ngram.rows.device), ngram.rows).flatten(1).to(tokens.device)
        return self.add(self.embedding(tokens, words), self.linear(rows, projection)) / (1 + ngram.starts.shape[0])

    def router_logits(self, x: Tensor, weight: Weight) -> Tensor:
        return self.linear(x.float(), weight)

    def route(
        self, logits: Tensor, routing: Routing, bias: Tensor | None, live: LiveRows | None = None
    ) -> tuple[Tensor, Tensor]:
        return route(logits, routing, bias, live)

    def experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, routing: Routing, shared: Tensor | None
    ) -> Tensor:
        out = combine(x, weights, ids, experts, routing)
        return out if shared is None else self.add(out, shared)

    def experts_add_rms_norm(self, addend: ExpertSum, residual: Tensor, norm: Tensor, eps: float) -> Rows:
        return self.add_rms_norm(addend.tensor(), residual, norm, eps)


def partner(x: Tensor, interleaved: bool) -> Tensor:
    """Each value's partner in its rotary pair: neox (i, i + D/2), interleaved (2i, 2i + 1)."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.roll(x, x.shape[-1] // 2, -1)
