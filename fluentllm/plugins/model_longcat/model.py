"""The LongCat-Flash network: layers of two MLAs, two dense MLPs and one MoE on a shortcut; n-gram embedding; MTP layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from fluentllm.kernels.moe import LiveRows, Routing
from fluentllm.kernels.ngram import NgramHash
from fluentllm.layers.embedding import Embedding, Head
from fluentllm.layers.mla import MLA, MLALayer, MLAShape
from fluentllm.layers.mlp import MLP
from fluentllm.layers.module import Module
from fluentllm.layers.moe import SparseMoE
from fluentllm.layers.mtp import MTP, DraftingModel, MTPNames
from fluentllm.layers.ngram import NgramEmbedding
from fluentllm.layers.norm import RMSNorm
from fluentllm.layers.rotary import Rotary
from fluentllm.layers.side_stream import SideStream

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionBackend, BuildContext
    from fluentllm.kernels.residual import Addend

    from .config import LongcatConfig, NgramConfig


class Longcat(DraftingModel):
    """A `core.protocols.Model`; `mtp` is its draft layer, or None. Oracle: Transformers' `longcat_flash`."""

    def __init__(self, ctx: BuildContext, config: LongcatConfig) -> None:
        super().__init__()
        self.spec = config.spec()
        self.embedding = Embedding(ctx, "model.embed_tokens", config.vocab, config.hidden)
        self.ngram = _ngram(ctx, config, config.ngram, self.embedding) if config.ngram else None
        self.rotary = Rotary(ctx, config.raw, config.rope, config.max_position, interleaved=True)
        side = SideStream() if ctx.moe_overlap else None
        self.layers = [LongcatLayer(ctx, config, number, self.rotary, side) for number in range(config.layers)]
        self.norm = RMSNorm(ctx, "model.norm", config.hidden, config.eps)
        self.head = Head(ctx, "model.embed_tokens" if config.tied else "lm_head", config.vocab, config.hidden)
        self.mtp = _mtp(ctx, config, self.rotary)

    def forward(self, batch: Batch, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm, [T, hidden]."""
        attention.begin(batch)
        residual = self.embedding(batch.tokens) if self.ngram is None else self.ngram(batch)
        return self.run_layers(residual, self.rotary.rows(batch.positions), batch, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab] float32."""
        return self.head(hidden)


class LongcatLayer(Module):
    """Attention and dense MLP, twice; the MoE reads what the first MLP reads, and is added at the end: so in decode it may run
    on a stream of its own meanwhile."""

    def __init__(self, ctx: BuildContext, config: LongcatConfig, number: int, rotary: Rotary, side: SideStream | None) -> None:
        prefix, hidden, eps = f"model.layers.{number}", config.hidden, config.eps
        shape = _shape(config)
        self.input_norms = [RMSNorm(ctx, f"{prefix}.input_layernorm.{i}", hidden, eps) for i in (0, 1)]
        self.attentions = [MLA(ctx, f"{prefix}.self_attn.{i}", shape, rotary, 2 * number + i) for i in (0, 1)]
        self.post_norms = [RMSNorm(ctx, f"{prefix}.post_attention_layernorm.{i}", hidden, eps) for i in (0, 1)]
        self.mlps = [MLP(ctx, f"{prefix}.mlps.{i}", hidden, config.intermediate) for i in (0, 1)]
        self.moe = SparseMoE(
            ctx,
            f"{prefix}.mlp",
            Routing(experts=config.experts, zero_experts=config.zero_experts, top_k=config.top_k, scale=config.routed_scale),
            hidden,
            config.expert_intermediate,
            router="router.classifier",
            bias="router.e_score_correction_bias",
        )
        self._side = side

    def __call__(
        self, delta: Addend | None, residual: Tensor, rows: tuple[Tensor, Tensor], batch: Batch, attention: AttentionBackend
    ) -> Addend:
        """`delta` is what is still to be added to `residual` → what this layer leaves to be added. `residual` changes."""
        attended = self.attentions[0](self.input_norms[0].enter(delta, residual), rows, batch, attention)
        x = self.post_norms[0].enter(attended, residual)
        # Prefill fills the chip by itself, and its tensors are large: a second stream would hold memory apart.
        side = self._side if batch.query_length is not None else None
        moe = partial(self.moe, live=LiveRows(batch.kv_rows, batch.page_size))
        if side is None:
            shortcut = moe(x)
        else:
            side.start(moe, x)
        x = self.input_norms[1].enter(self.mlps[0].later(x), residual)
        attended = self.attentions[1](x, rows, batch, attention)
        out = self.mlps[1].later(self.post_norms[1].enter(attended, residual))
        if side is not None:
            shortcut = side.result()
        return out.plus(shortcut)


def _shape(config: LongcatConfig) -> MLAShape:
    return MLAShape(
        hidden=config.hidden,
        heads=config.heads,
        q_lora=config.q_lora,
        kv_lora=config.kv_lora,
        nope=config.nope,
        rope=config.rope,
        value=config.value,
        bias=config.bias,
        query_scale=config.query_scale,
        latent_scale=config.latent_scale,
    )


def _mtp(ctx: BuildContext, config: LongcatConfig, rotary: Rotary) -> MTP:
    prefix = "model.mtp.layers.0"
    names = MTPNames(
        layer=prefix,
        embedding="model.mtp.embed_tokens",
        token_norm=f"{prefix}.enorm.m",
        hidden_norm=f"{prefix}.hnorm.m",
        norm="model.mtp.norm",
    )
    mlp = MLP(ctx, f"{prefix}.transformer_layer.mlp", config.hidden, config.intermediate)
    layer = MLALayer(ctx, prefix, _shape(config), config.eps, rotary, 2 * config.layers, mlp)
    return MTP(ctx, names, config.vocab, config.hidden, config.eps, layer)


def _ngram(ctx: BuildContext, config: LongcatConfig, ngram: NgramConfig, word: Embedding) -> NgramEmbedding:
    hash_ = NgramHash(config.vocab, ngram.ratio, ngram.neighbors, ngram.splits, ngram.stops)
    size = sum(hash_.rows(i) for i in range(hash_.tables)) * config.hidden // hash_.tables * ctx.dtype.itemsize
    return NgramEmbedding(ctx, "model.ngram_embeddings", word, hash_, config.hidden, host=_too_large(size, ctx.device))


def _too_large(size: int, device: torch.device) -> bool:
    """Tables that would take more than a quarter of a GPU's memory stay in the host's."""
    return device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory // 4
