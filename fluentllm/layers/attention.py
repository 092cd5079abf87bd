"""Attention with grouped key and value heads: projections, norms of queries and keys, rotary; the backend does the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.protocols import Appending, FusedGQA
from .linear import Linear
from .module import Module, join
from .norm import RMSNorm

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import AttentionBackend, BuildContext
    from ..kernels.residual import Product, Rows
    from .rotary import Rotary


@dataclass(frozen=True, slots=True)
class AttentionShape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    """On q, k and v."""
    out_bias: bool = False
    norm_eps: float | None = None
    """If set, queries and keys are normed head by head before rotary (`q_norm`, `k_norm`)."""
    inputs: int | None = None
    """Width of what q, k and v are made from; `hidden` if None."""


class Attention(Module):
    """[T, inputs] → [T, hidden], for the residual stream. q, k and v are one product, and q and k are rotated in one call."""

    def __init__(self, ctx: BuildContext, prefix: str, shape: AttentionShape, layer: int, rotary: Rotary) -> None:
        self.layer = layer
        self.shape = shape
        dim = shape.head_dim
        parts = {"q_proj": shape.heads * dim, "k_proj": shape.kv_heads * dim, "v_proj": shape.kv_heads * dim}
        self.qkv = Linear(ctx, prefix, shape.inputs or shape.hidden, parts, bias=shape.bias)
        self.o = Linear(ctx, prefix, shape.heads * dim, {"o_proj": shape.hidden}, bias=shape.out_bias)
        self.q_norm = self.k_norm = None
        if shape.norm_eps is not None:
            self.q_norm = RMSNorm(ctx, join(prefix, "q_norm"), dim, shape.norm_eps)
            self.k_norm = RMSNorm(ctx, join(prefix, "k_norm"), dim, shape.norm_eps)
        self._rotary = rotary
        self._scale = dim**-0.5
        self._heads = (shape.heads + 2 * shape.kv_heads, dim)
        self._first_v = shape.heads + shape.kv_heads

    def __call__(self, x: Rows, rope: tuple[Tensor, Tensor], batch: Batch, backend: AttentionBackend) -> Product:
        """`rope` is `Rotary.rows(batch.positions)`."""
        heads = self.shape.heads
        product = self.qkv(x)
        if isinstance(backend, FusedGQA):
            out = backend.gqa_from_product(self.layer, product, heads, rope, batch, self._scale, **self._norms())
            return self.o.later(out.flatten(1))
        qkv = product.view(-1, *self._heads)
        v = qkv[:, self._first_v :]
        if self.q_norm is None or self.k_norm is None:
            qk = self._rotary(qkv[:, : self._first_v], rope)
            q, k = qk[:, :heads], qk[:, heads:]
        else:
            q = self._rotary(self.q_norm(qkv[:, :heads]), rope)
            k = self._rotary(self.k_norm(qkv[:, heads : self._first_v]), rope)
        out = backend.gqa(self.layer, q, k, v, batch, self._scale)
        return self.o.later(out.flatten(1))

    def append(self, x: Rows, rope: tuple[Tensor, Tensor], batch: Batch, backend: AttentionBackend) -> None:
        """The KV of all rows, and no more where the backend can do that alone."""
        if isinstance(backend, FusedGQA):
            backend.gqa_append(self.layer, self.qkv(x), self.shape.heads, rope, batch, **self._norms())
        elif isinstance(backend, Appending):
            qkv = self.qkv(x).view(-1, *self._heads)
            k = qkv[:, self.shape.heads : self._first_v]
            k = self._rotary(k if self.k_norm is None else self.k_norm(k), rope)
            backend.append_gqa(self.layer, k, qkv[:, self._first_v :], batch)
        else:
            self(x, rope, batch, backend)

    def _norms(self) -> dict[str, Any]:
        """What `FusedGQA` is told of queries and keys."""
        return {
            "q_weight": self.q_norm.weight if self.q_norm is not None else None,
            "k_weight": self.k_norm.weight if self.k_norm is not None else None,
            "eps": self.shape.norm_eps or 0.0,
            "interleaved": self._rotary.interleaved,
        }
