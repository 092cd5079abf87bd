"""`Ops` of deterministic mode on a GPU: a row has the same bits whatever other rows there are, and nothing waits for the host.

Products take tiles chosen by the matrix alone, experts one tile for any number of tokens; the rest of `TritonOps` computes
each row by a program of its own and is used as it is. Beside it: `kernels.fixed_order.FixedOrderOps`, the same in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..fixed_order import tiled
from ..fp8_weight import Fp8BlockWeight
from ..plain import PlainOps
from ..weights import DenseWeight
from . import fp8_quantise, moe_scores, ngram as ngrams
from .fixed_product import fixed_bmm, fixed_linear
from .moe_tiles import Tile
from .ops import TritonOps, expert_sum

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe import Routing
    from ..ngram import NgramTables
    from ..ops import ExpertWeights
    from ..weights import Weight

EXPERT_TILE = Tile(32, 64, 128, 4, 3)
FLOAT32_EXPERT_TILE = Tile(32, 64, 32, 4, 3)
FP8_EXPERT_TILE = Tile(32, 128, 128, 4, 4, swapped=True)


class FixedTritonOps(TritonOps):
    """`kernels.ops.Ops` whose rows do not depend on each other, nor on how many there are."""

    deterministic = True

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, DenseWeight):
            dtype = weight.weight.dtype
            if x.dtype is dtype:
                return fixed_linear(_rows(x, dtype), weight.weight, other=bias)
            y = fixed_linear(_rows(x, dtype), weight.weight).to(x.dtype)
        elif isinstance(weight, Fp8BlockWeight):
            q, scale = fp8_quantise.quantise_rows(_rows(x, x.dtype))
            return fixed_linear(q, weight.q, x_scale=scale, w_scale=weight.scale, other=bias, out_dtype=x.dtype)
        else:
            y = tiled(lambda tile: weight.product(tile, None), x)
        return y if bias is None else y + bias

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if bias is None and isinstance(weight, DenseWeight) and x.dtype is weight.weight.dtype:
            return fixed_linear(_rows(x, x.dtype), weight.weight, gated=True)
        if bias is None and isinstance(weight, Fp8BlockWeight):
            q, scale = fp8_quantise.quantise_rows(_rows(x, x.dtype))
            return fixed_linear(q, weight.q, x_scale=scale, w_scale=weight.scale, gated=True, out_dtype=x.dtype)
        return self.silu_mul(self.linear(x, weight, bias))

    def logits(self, hidden: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, DenseWeight) and hidden.dtype is weight.weight.dtype:
            return fixed_linear(_rows(hidden, hidden.dtype), weight.weight, out_dtype=torch.float32)
        return self.linear(hidden, weight).float()

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        return fixed_bmm(a, b)

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
        if ngram.rows.device.type == "cpu" and words.is_cuda and not ngram.rows.is_pinned():
            return PlainOps.ngram_embedding(self, tokens, positions, slots, history, ngram, words, projection)
        rows, word_rows = ngrams.ngram_gather(
            tokens, positions, slots, history, ngram.stops, ngram.factors, ngram.moduli, ngram.starts, ngram.rows, words
        )
        return self.linear(rows, projection).add_(word_rows).div_(1 + ngram.starts.shape[0])

    def router_logits(self, x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, DenseWeight):
            return moe_scores.router_logits(x, weight.weight, each=4)
        return self.linear(x.float(), weight)

    def experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, routing: Routing, shared: Tensor | None
    ) -> Tensor:
        if experts.gate_up is None or experts.down is None:
            # Packed one by one: calls `linear` for each expert, and waits for the ids.
            return super().experts(x, weights, ids, experts, routing, shared)
        tile = FLOAT32_EXPERT_TILE if x.dtype is torch.float32 else EXPERT_TILE
        if experts.gate_up_scale is not None:
            tile = FP8_EXPERT_TILE
        return expert_sum(x, weights, ids, experts, shared, tile=tile)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, with the last dimension contiguous."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()
