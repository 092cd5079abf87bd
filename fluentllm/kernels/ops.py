"""The tensor operations that layers are written in, so that a model has one text and several arithmetics.

`plain.PlainOps` is torch's, `native.ops.NativeOps` and `triton.ops.TritonOps` put faster ones in its place on a CPU and a GPU;
`fixed_order.FixedOrderOps` and `triton.fixed_ops.FixedTritonOps` give each row the same bits whatever else is in the batch
(deterministic mode). `kernels.choose_ops` chooses; a model gets one in its `BuildContext` and calls nothing else for arithmetic
on activations.
Rows are tokens: T of them, in any number, none included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .moe import LiveRows, Routing
    from .ngram import NgramTables
    from .residual import ExpertSum, Rows
    from .weights import Weight


class ExpertWeights(Protocol):
    """The routed experts' SwiGLU matrices of one layer."""

    gate_up: Tensor | None
    """[E, 2 · inner, hidden], gate rows first; None where matrices are packed one by one."""
    down: Tensor | None
    """[E, hidden, inner]."""
    gate_up_scale: Tensor | None
    """float32 [E, 2 · inner / 128, hidden / 128] where both are block FP8 (E4M3), else None."""
    down_scale: Tensor | None
    """float32 [E, hidden / 128, inner / 128]."""

    def __call__(self, number: int, rows: Tensor) -> Tensor:
        """rows [n, hidden] → what expert `number` makes of them, [n, hidden]."""
        ...


class Ops(Protocol):
    """What a layer may ask for. Results are new tensors unless said otherwise."""

    deterministic: bool
    joins_shared_experts: bool
    """Are shared experts best computed with the routed ones, in the same products (`Routing.shared`)?"""

    def pack(self, weight: Tensor, precision: str) -> Weight:
        """weight [out, in], float; precision one of `weights.PRECISIONS` → what `linear` takes."""
        ...

    def pack_blocks(self, kind: str, parts: Mapping[str, Tensor], precision: str) -> Weight | None:
        """Take a checkpoint's blocks as they are (`kind` and `parts` as in `core.protocols.PackedTensor`), or None if
        this precision has no place for them."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → x Wᵀ + bias [T, out], in x's dtype."""
        ...

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [T, in], weight [2 I, in], gate rows first → silu(gate) · up of the product, [T, I]."""
        ...

    def logits(self, hidden: Tensor, weight: Weight) -> Tensor:
        """hidden [R, in], weight [V, in] → [R, V] float32."""
        ...

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """a [B, T, K], b [B, K, N] → [B, T, N]: one product of all T rows for each of B weights (heads, experts)."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D], weight [D] → x / sqrt(mean(x²) + eps) · weight, computed in float32."""
        ...

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += delta, in place; → rms_norm(residual)."""
        ...

    def linear_add_rms_norm(
        self, x: Tensor, weight: Weight, other: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> Rows:
        """x [T, in], weight [D, in], other [T, D] or [D] or None, norm [D]: residual [T, D] += x Wᵀ + other, in place;
        → rms_norm(residual)."""
        ...

    def linear_rms_norm(self, x: Rows, weight: Weight, bias: Tensor | None, norm: Tensor, eps: float) -> tuple[Rows, Tensor]:
        """x [T, in], weight [D + R, in], norm [D] → of the product's columns the first D, normed, and the other R as they are,
        [T, R] (rows may lie apart)."""
        ...

    def add(self, a: Tensor, b: Tensor) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 I] → silu(gate) · up [T, I]."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """x [T, H, D], cos and sin [T, 1, R] of each row's position, R ≤ D: rotates the first R values of each head.

        neox: pairs (i, i + R/2); interleaved: pairs (2i, 2i + 1). `cos` and `sin` come from `layers.rotary.Rotary`, which
        lays them out for the kind in question, signs included: out = x · cos + partner(x) · sin.
        """
        ...

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens [T] int64, table [V, D] → [T, D]."""
        ...

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
        """What a draft layer projects: tokens, positions [T] int64, table [V, D], hidden [T, D], norms [D] each →
        [rms_norm(table[token]) ; rms_norm(hidden)], [T, 2 D]; at position 0 zeros stand for hidden."""
        ...

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
        """tokens, positions, slots [T] int64 (slots: each token's line in `history` [S, L] integers), words [vocab, hidden],
        projection [hidden, hidden] of the tables' rows side by side → (word + Σ_i P_i e_i) / (1 + tables), [T, hidden]."""
        ...

    def router_logits(self, x: Tensor, weight: Weight) -> Tensor:
        """x [T, hidden] of any dtype, weight [total, hidden] float32 → [T, total] float32."""
        ...

    def route(
        self, logits: Tensor, routing: Routing, bias: Tensor | None, live: LiveRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """logits [T, total] float32, bias [total] float32 → weights [T, each] float32, ids [T, each] integers (`moe.route`)."""
        ...

    def experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, routing: Routing, shared: Tensor | None
    ) -> Tensor:
        """x [T, hidden], weights and ids of `route`, shared [T, hidden] → Σ_k weight · expert(x) + shared, [T, hidden];
        zero experts return x."""
        ...

    def experts_add_rms_norm(self, addend: ExpertSum, residual: Tensor, norm: Tensor, eps: float) -> Rows:
        """residual [T, hidden] += the experts' sum, in place; → rms_norm(residual)."""
        ...
