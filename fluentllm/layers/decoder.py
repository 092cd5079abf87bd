"""The trunk of Llama-like models: embedding, pre-norm decoder layers, final norm, head.

`plugins/model_llama` and `plugins/model_qwen` read their configs into a `DecoderConfig` and build a `Decoder`; what differs
between them is there, what they share is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernels.moe import LiveRows
from .attention import Attention, AttentionShape
from .embedding import Embedding, Head
from .mlp import MLP
from .module import Module, join
from .norm import RMSNorm
from .rotary import Rotary
from .trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import AttentionBackend, BuildContext
    from ..core.types import ModelSpec
    from ..kernels.residual import Addend
    from .module import Block

    FeedForward = Callable[[BuildContext, str, int], Block]
    """(context, prefix, layer) → the layer's feed-forward block."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What a Llama-like model is, beside its feed-forward blocks."""

    spec: ModelSpec
    attention: AttentionShape
    inner: int
    norm_eps: float
    tied: bool
    rope: Mapping[str, Any]
    """The config that `Rotary` reads."""
    rotary_dim: int
    mlp_bias: bool = False


class DecoderLayer(Module):
    """x + attention(norm(x)), then + feed-forward(norm(·)); the residual is carried beside and added in place."""

    def __init__(self, ctx: BuildContext, prefix: str, config: DecoderConfig, layer: int, rotary: Rotary, mlp: Block) -> None:
        hidden = config.spec.hidden_size
        self.input_norm = RMSNorm(ctx, join(prefix, "input_layernorm"), hidden, config.norm_eps)
        self.attention = Attention(ctx, join(prefix, "self_attn"), config.attention, layer, rotary)
        self.post_norm = RMSNorm(ctx, join(prefix, "post_attention_layernorm"), hidden, config.norm_eps)
        self.mlp = mlp

    def __call__(
        self, delta: Addend | None, residual: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, backend: AttentionBackend
    ) -> Addend:
        """`delta` is what the layer before left to be added to `residual` → what this one leaves."""
        attended = self.attention(self.input_norm.enter(delta, residual), rope, batch, backend)
        return self.mlp.later(self.post_norm.enter(attended, residual), LiveRows(batch.kv_rows, batch.page_size))


class Decoder(Trunk):
    """A `core.protocols.Model`."""

    def __init__(self, ctx: BuildContext, config: DecoderConfig, feed_forward: FeedForward | None = None) -> None:
        spec = self.spec = config.spec
        hidden = spec.hidden_size
        self.embedding = Embedding(ctx, "model.embed_tokens", spec.vocab_size, hidden)
        self.rotary = Rotary(ctx, config.rope, config.rotary_dim, spec.max_position)
        self.layers = [self._layer(ctx, config, number, feed_forward) for number in range(spec.layers)]
        self.norm = RMSNorm(ctx, "model.norm", hidden, config.norm_eps)
        self.head = Head(ctx, "model.embed_tokens" if config.tied else "lm_head", spec.vocab_size, hidden)

    def _layer(self, ctx: BuildContext, config: DecoderConfig, number: int, feed_forward: FeedForward | None) -> DecoderLayer:
        prefix = f"model.layers.{number}"
        if feed_forward is None:
            mlp: Block = MLP(ctx, join(prefix, "mlp"), config.spec.hidden_size, config.inner, bias=config.mlp_bias)
        else:
            mlp = feed_forward(ctx, join(prefix, "mlp"), number)
        return DecoderLayer(ctx, prefix, config, number, self.rotary, mlp)

    def forward(self, batch: Batch, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm, [T, hidden]."""
        attention.begin(batch)
        residual = self.embedding(batch.tokens)
        return self.run_layers(residual, self.rotary.rows(batch.positions), batch, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab] float32."""
        return self.head(hidden)
