"""Builds Qwen networks: the shared decoder, with experts for its feed-forward blocks where the config says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.kernels.moe import Routing
from fluentllm.layers.decoder import Decoder
from fluentllm.layers.fields import Fields
from fluentllm.layers.mlp import MLP
from fluentllm.layers.moe import SparseMoE

from .config import expert_count, has_experts, read_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.core.protocols import BuildContext
    from fluentllm.layers.decoder import FeedForward
    from fluentllm.layers.module import Block


def build(kind: str, config: Mapping[str, Any], ctx: BuildContext) -> Decoder:
    """`kind` is qwen2, qwen3 or qwen3_moe."""
    return Decoder(ctx, read_config(kind, config), _experts(config) if kind == "qwen3_moe" else None)


def _experts(config: Mapping[str, Any]) -> FeedForward:
    """Softmax over all experts, the best few, renormalised if `norm_topk_prob`."""
    fields = Fields({**config, "num_experts": expert_count(config)}, "Qwen3MoeForCausalLM")
    hidden = fields.size("hidden_size")
    routing = Routing(
        experts=fields.size("num_experts"),
        top_k=fields.size("num_experts_per_tok"),
        renormalise=fields.flag("norm_topk_prob", False),
    )
    inner = fields.size("moe_intermediate_size")

    def feed_forward(ctx: BuildContext, prefix: str, layer: int) -> Block:
        if has_experts(config, layer):
            return SparseMoE(ctx, prefix, routing, hidden, inner)
        return MLP(ctx, prefix, hidden, fields.size("intermediate_size"))

    return feed_forward
