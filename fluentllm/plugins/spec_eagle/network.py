"""The draft networks: one Llama layer on (token, state of the position before). Both are `step.chain.DraftLayer`s.

EAGLE's drafts have no pair for a sequence's first token, so their KV begins at position 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.core.errors import ConfigError
from fluentllm.core.protocols import DraftReads, WeightSlot
from fluentllm.layers.attention import Attention, AttentionShape
from fluentllm.layers.embedding import Embedding, Head
from fluentllm.layers.linear import Linear
from fluentllm.layers.mlp import MLP
from fluentllm.layers.module import Module, join
from fluentllm.layers.norm import RMSNorm
from fluentllm.layers.rotary import Rotary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionBackend, BuildContext

    from .config import EagleConfig


class DraftLayer(Module):
    """What both kinds have: embedding, fc, attention, feed-forward. `prefix`: of the layer in the checkpoint."""

    first_key = 1
    vocabulary: Tensor | None = None

    def __init__(self, ctx: BuildContext, config: EagleConfig, target: Any, prefix: str, inputs: int, fused: int) -> None:
        hidden = self.width = config.hidden
        self._ctx = ctx
        self._config = config
        self.embedding: Embedding | None = Embedding(ctx, "embed_tokens", config.vocab, hidden)
        self.fc = Linear(ctx, "", fused, {"fc": hidden}, bias=config.fc_bias)
        shape = AttentionShape(
            hidden, config.heads, config.kv_heads, config.head_dim, config.attention_bias, config.attention_bias, inputs=inputs
        )
        self.rotary = Rotary(ctx, config.raw, config.rotary_dim, config.max_position)
        self.attention = Attention(ctx, join(prefix, "self_attn"), shape, 0, self.rotary)
        self.post_norm = RMSNorm(ctx, join(prefix, "post_attention_layernorm"), hidden, config.eps)
        self.mlp = MLP(ctx, join(prefix, "mlp"), hidden, config.inner, bias=config.mlp_bias)
        # The target's parts are held as functions: as modules they would count as the draft's.
        self._embed: Callable[[Tensor], Tensor] = self.embedding.__call__
        self._with_states = self.embedding.with_states
        self._target_logits: Callable[[Tensor], Tensor] = target.logits
        self._target_head: Callable[[], Any] = lambda: target.head

    def _reads(self, once: tuple[Module, ...], head: Any) -> DraftReads:
        parts = [value for value in vars(self).values() if isinstance(value, Module)]
        # Of the target's embedding, if it is that, rows only: nothing beside the rest.
        return DraftReads(once, (*(part for part in parts if part not in once), head), self._config.kv())

    def share_embedding(self, target: Any) -> None:
        """Take the target's: the checkpoint has none. Raises `ConfigError` if it is of another width."""
        embedding = getattr(target, "embedding", None)
        if not isinstance(embedding, Embedding) or embedding.table.shape[1] != self.width:
            raise ConfigError(
                f"The draft model at {self._config.path} has no embed_tokens.weight, and the target's does not fit it.",
                fix="Use a draft model that brings its embedding.",
                param="speculative.model",
            )
        self.embedding, self._embed, self._with_states = None, embedding.__call__, embedding.with_states

    def _layer(self, x: Tensor, residual: Tensor, batch: Batch, attention: AttentionBackend, wanted: Tensor | None) -> Tensor:
        """x [T, inputs] → attention, + `residual`, feed-forward: [T, hidden] or [W, hidden]. `residual` may change."""
        rows = self.rotary.rows(batch.positions)
        if wanted is not None and not wanted.shape[0]:
            self.attention.append(x, rows, batch, attention)
            return residual[:0]
        attended = self.attention(x, rows, batch, attention)
        if wanted is not None:
            attended, residual = attended.of(wanted), residual[wanted]
        x = self.mlp(self.post_norm.enter(attended, residual))
        return residual + x


class Eagle(DraftLayer):
    """EAGLE 1 and 2: the layer runs on fc([embedding ; state]), without a norm before; states are hidden states after the
    target's final norm, and what the layer gives stands for such. Head: the target's."""

    def __init__(self, ctx: BuildContext, config: EagleConfig, target: Any, prefix: str) -> None:
        super().__init__(ctx, config, target, prefix, config.hidden, 2 * config.hidden)

    def target_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        return hidden

    @property
    def reads(self) -> DraftReads:
        return self._reads((), self._target_head())

    def forward(self, states: Tensor, batch: Batch, attention: AttentionBackend, wanted: Tensor | None = None) -> Tensor:
        attention.begin(batch)
        x = self.fc(torch.cat((self._embed(batch.tokens), states), -1))
        return self._layer(x, x, batch, attention, wanted)

    def logits(self, states: Tensor) -> Tensor:
        return self._target_logits(states)

    def own_slots(self) -> Iterator[WeightSlot]:
        # Some checkpoints carry the target's head, or the layer's input norm, which is not used.
        for name, shape in (("lm_head.weight", ()), ("layers.0.input_layernorm.weight", ())):
            yield WeightSlot(name, shape, _drop, unused=True)


class Eagle3(DraftLayer):
    """EAGLE-3: q, k and v are made from [norm(embedding) ; norm(state)]. The target's states are fc of three hidden states; the
    layer's output, before its final norm, is the state of the drafts after it. Head and vocabulary: its own."""

    def __init__(self, ctx: BuildContext, config: EagleConfig, target: Any, prefix: str) -> None:
        super().__init__(ctx, config, target, prefix, 2 * config.hidden, 3 * config.target_hidden)
        self.token_norm = RMSNorm(ctx, join(prefix, "input_layernorm"), config.hidden, config.eps)
        self.state_norm = RMSNorm(ctx, join(prefix, "hidden_norm"), config.hidden, config.eps)
        self.norm = RMSNorm(ctx, "norm", config.hidden, config.eps)
        self.head = Head(ctx, "lm_head", config.draft_vocab, config.hidden)

    @property
    def reads(self) -> DraftReads:
        return self._reads((self.fc,), self.head)

    def target_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        return self.fc(torch.cat(batch.layer_inputs, -1))

    def forward(self, states: Tensor, batch: Batch, attention: AttentionBackend, wanted: Tensor | None = None) -> Tensor:
        attention.begin(batch)
        # Rows at position 0, whose states are not taken, are before the first key: they mean nothing.
        x = self._with_states(batch, states, self.token_norm, self.state_norm)
        residual = x[:, self.width :] if self._config.norm_before_residual else states
        # The layer adds to it in place, and the states are the caller's.
        return self._layer(x, residual.clone() if wanted is None else residual, batch, attention, wanted)

    def logits(self, states: Tensor) -> Tensor:
        return self.head(self.norm(states))

    def own_slots(self) -> Iterator[WeightSlot]:
        size = self._config.draft_vocab
        yield WeightSlot("d2t", (size,), self._take_offsets, optional=size == self._config.vocab, init="zeros", drafts=True)
        yield WeightSlot("t2d", (self._config.vocab,), _drop, unused=True)

    def _take_offsets(self, offsets: Tensor) -> None:
        """Draft id i stands for the token i + offsets[i]."""
        tokens = torch.arange(offsets.shape[0], device=offsets.device) + offsets.to(torch.int64)
        inside = bool(((tokens >= 0) & (tokens < self._config.vocab)).all())
        if not inside or not bool((tokens.diff() > 0).all()):
            raise ConfigError(
                f"d2t of the draft model at {self._config.path} does not lead to {offsets.shape[0]} different tokens of the "
                f"target's {self._config.vocab}, in order.",
                fix="Fetch the draft model again, or give one that was trained for this target.",
                param="speculative.model",
            )
        self.vocabulary = tokens.to(self._ctx.device)


def _drop(tensor: Tensor) -> None:
    """Unused tensors are not read."""
