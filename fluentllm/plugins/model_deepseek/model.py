"""The DeepSeek network: MLA layers, the first ones dense, the others with experts, and the MTP layer where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.kernels.moe import Routing
from fluentllm.layers.embedding import Embedding, Head
from fluentllm.layers.mla import MLALayer, MLAShape
from fluentllm.layers.mlp import MLP
from fluentllm.layers.moe import SparseMoE
from fluentllm.layers.mtp import MTP, DraftingModel, MTPNames
from fluentllm.layers.norm import RMSNorm
from fluentllm.layers.rotary import Rotary

from .config import V3, DeepseekConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionBackend, BuildContext
    from fluentllm.layers.module import Block


class Deepseek(DraftingModel):
    """A `core.protocols.Model`; `mtp` is its draft layer, or None. Oracles: Transformers' `deepseek_v2`, `deepseek_v3`."""

    def __init__(self, ctx: BuildContext, config: DeepseekConfig) -> None:
        super().__init__()
        self.spec = config.spec()
        self.embedding = Embedding(ctx, "model.embed_tokens", config.vocab, config.hidden)
        self.rotary = Rotary(ctx, config.raw, config.rope, config.max_position, interleaved=config.interleaved)
        self.layers = [self._layer(ctx, config, number) for number in range(config.layers)]
        self.norm = RMSNorm(ctx, "model.norm", config.hidden, config.eps)
        self.head = Head(ctx, "model.embed_tokens" if config.tied else "lm_head", config.vocab, config.hidden)
        self.mtp = self._mtp(ctx, config) if config.mtp else None

    def forward(self, batch: Batch, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm, [T, hidden]."""
        attention.begin(batch)
        residual = self.embedding(batch.tokens)
        return self.run_layers(residual, self.rotary.rows(batch.positions), batch, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab] float32."""
        return self.head(hidden)

    def _layer(self, ctx: BuildContext, config: DeepseekConfig, number: int) -> MLALayer:
        prefix = f"model.layers.{number}"
        shape = MLAShape(
            hidden=config.hidden,
            heads=config.heads,
            q_lora=config.q_lora,
            kv_lora=config.kv_lora,
            nope=config.nope,
            rope=config.rope,
            value=config.value,
            bias=config.bias,
        )
        return MLALayer(
            ctx, prefix, shape, config.eps, self.rotary, number, _feed_forward(ctx, config, number, f"{prefix}.mlp")
        )

    def _mtp(self, ctx: BuildContext, config: DeepseekConfig) -> MTP:
        prefix = f"model.layers.{config.layers}"
        names = MTPNames(
            layer=prefix,
            embedding=f"{prefix}.embed_tokens",
            token_norm=f"{prefix}.enorm",
            hidden_norm=f"{prefix}.hnorm",
            norm=f"{prefix}.shared_head.norm",
            head=f"{prefix}.shared_head.head",
        )
        return MTP(ctx, names, config.vocab, config.hidden, config.eps, self._layer(ctx, config, config.layers))


def _feed_forward(ctx: BuildContext, config: DeepseekConfig, number: int, prefix: str) -> Block:
    if number < config.dense_layers:
        return MLP(ctx, prefix, config.hidden, config.intermediate)
    v3 = config.architecture == V3
    routing = Routing(
        experts=config.experts,
        top_k=config.top_k,
        scores="sigmoid" if v3 else "softmax",
        groups=config.groups,
        top_groups=config.top_groups,
        group_score="top2" if v3 else "max",
        renormalise=config.renormalise,
        scale=config.routed_scale,
    )
    return SparseMoE(
        ctx,
        prefix,
        routing,
        config.hidden,
        config.expert_intermediate,
        bias="gate.e_score_correction_bias" if v3 else None,
        shared_inner=config.shared_experts * config.expert_intermediate,
    )
