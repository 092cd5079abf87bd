"""`Ops` on a GPU: products of many rows by torch, everything else by the kernels of this room."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from .. import in_kernels
from ..fp8_weight import Fp8BlockWeight
from ..plain import PlainOps
from ..weights import DenseWeight
from . import elementwise, moe, moe_route, moe_scores, ngram as ngrams, norm
from .moe_scores_wide import RouterWeight, wide_router_logits
from .streamed_weight import Streamed, StreamedFp8Weight, StreamedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..moe import LiveRows, Routing
    from ..ngram import NgramTables
    from ..ops import ExpertWeights
    from ..weights import Weight
    from .moe_tiles import Tile
    from .normed import NormAfter, Normed


log = logging.getLogger("fluentllm.engine")


class TritonOps(PlainOps):
    """`kernels.ops.Ops`. What has no kernel here, or an operand whose last dimension is not contiguous, is `PlainOps`'."""

    joins_shared_experts = True

    def pack(self, weight: Tensor, precision: str) -> Weight:
        packed = super().pack(weight, precision)
        if isinstance(packed, DenseWeight) and in_kernels(packed.weight):
            return (RouterWeight if packed.weight.dtype is torch.float32 else StreamedWeight)(packed.weight)
        return self._fp8(packed) if isinstance(packed, Fp8BlockWeight) else packed

    def pack_blocks(self, kind: str, parts: Mapping[str, Tensor], precision: str) -> Weight | None:
        packed = super().pack_blocks(kind, parts, precision)
        return self._fp8(packed) if isinstance(packed, Fp8BlockWeight) else packed

    def _fp8(self, weight: Fp8BlockWeight) -> Weight:
        if weight.in_features % 16:
            log.warning("A matrix of %d columns cannot stay FP8: a multiple of 16 is needed.", weight.in_features)
            return self.pack(weight.dequantised(), "bfloat16")
        return StreamedFp8Weight(weight.q, weight.scale)

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if bias is None and isinstance(weight, Streamed) and weight.streams(x):
            return weight.gated(x)
        return super().gated_linear(x, weight, bias)

    def logits(self, hidden: Tensor, weight: Weight) -> Tensor:
        """The sums leave the product in float32: rounded to 16 bits, logits would tie."""
        if not isinstance(weight, StreamedWeight):
            return super().logits(hidden, weight)
        if weight.streams(hidden):
            return weight.stream(hidden, out_dtype=torch.float32)
        return torch.mm(hidden, weight.weight.T, out_dtype=torch.float32)

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
        if hidden.stride(-1) != 1:
            return super().draft_input(tokens, positions, table, hidden, token_norm, hidden_norm, eps)
        return norm.draft_input(tokens, positions, table, hidden, token_norm, hidden_norm, eps)

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
        """Rows of tables in pinned host memory are read over the bus by the kernel itself: nothing waits."""
        host = ngram.rows.device.type == "cpu" and words.is_cuda
        if not isinstance(projection, DenseWeight) or (host and not ngram.rows.is_pinned()):
            return super().ngram_embedding(tokens, positions, slots, history, ngram, words, projection)
        rows, word_rows = ngrams.ngram_gather(
            tokens, positions, slots, history, ngram.stops, ngram.factors, ngram.moduli, ngram.starts, ngram.rows, words
        )
        tables = ngram.starts.shape[0]
        if isinstance(projection, StreamedWeight) and projection.streams(rows):
            return ngrams.ngram_embedding(rows, word_rows, projection.weight, tables, counters=projection.counters)
        return self.linear(rows, projection).add_(word_rows).div_(1 + tables)

    def router_logits(self, x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, DenseWeight) and x.shape[0] <= moe_scores.MOST_TOKENS:
            return moe_scores.router_logits(x, weight.weight)
        if isinstance(weight, RouterWeight) and weight.takes(x):
            return wide_router_logits(x, weight.weight, counters=weight.counters)
        return super().router_logits(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.stride(-1) != 1 or x.ndim not in (2, 3):
            return super().rms_norm(x, weight, eps)
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if delta.stride(-1) != 1 or residual.stride(-1) != 1 or residual.ndim != 2:
            return super().add_rms_norm(delta, residual, weight, eps)
        return norm.add_rms_norm(delta, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.stride(-1) != 1 or gate_up.ndim != 2:
            return super().silu_mul(gate_up)
        return elementwise.silu_mul(gate_up)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        if x.stride(-1) != 1 or x.ndim != 3:
            return super().rotary(x, cos, sin, interleaved=interleaved)
        return elementwise.rotary(x, cos, sin, interleaved=interleaved)

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        if tokens.ndim != 1:
            return super().embedding(tokens, table)
        return elementwise.embedding(tokens, table)

    def route(
        self, logits: Tensor, routing: Routing, bias: Tensor | None, live: LiveRows | None = None
    ) -> tuple[Tensor, Tensor]:
        return moe_route.route(logits, routing, bias, live)

    def experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, routing: Routing, shared: Tensor | None
    ) -> Tensor:
        if experts.gate_up is None:
            return super().experts(x, weights, ids.long(), experts, routing, shared)
        return expert_sum(x, weights, ids, experts, shared)


def expert_sum(
    x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, shared: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """Of experts whose matrices lie in one tensor; as `moe.experts`."""
    out = grouped_experts(x, weights, ids, experts, shared, tile=tile)
    assert isinstance(out, torch.Tensor)
    return out


def grouped_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: ExpertWeights,
    shared: Tensor | None,
    after: NormAfter | None = None,
    tile: Tile | None = None,
) -> Tensor | Normed:
    """The same, and `after` that."""
    assert experts.gate_up is not None
    assert experts.down is not None
    if experts.gate_up_scale is not None and experts.down_scale is not None:
        gate_up, down = (experts.gate_up, experts.gate_up_scale), (experts.down, experts.down_scale)
        return moe.fp8_experts(x, weights, ids, gate_up, down, shared, tile=tile, after=after)
    return moe.experts(x, weights, ids, experts.gate_up, experts.down, shared, tile=tile, after=after)
