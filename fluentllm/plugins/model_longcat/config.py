"""What a LongCat-Flash config.json means: shapes, router, n-gram tables, and the refusals by name. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluentllm.core.errors import CheckpointError
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.layers.fields import Fields

FLASH, FLASH_ALIAS, NGRAM = "LongcatFlashForCausalLM", "LongcatCausalLM", "LongcatFlashNgramForCausalLM"
"""LongCat-Flash, the other name under which some of its checkpoints came, and LongCat-Flash-Lite."""

OTHER_FEATURES = (
    "use_longcat_dsa",
    "index_topk",
    "index_n_heads",
    "linear_method",
    "mla_use_output_gate",
    "moe_group_size",
    "grouped_moe_norm_scale",
    "nextn_use_scmoe",
    "oe_vocab_size_ratio",
    "ngram_exclude_sp_token",
    "ngram_fix_normalize_factor",
)
"""What later models of the family switch on by these fields: sparse and linear attention, grouped routing, other n-grams."""


@dataclass(frozen=True, slots=True)
class NgramConfig:
    ratio: float
    neighbors: int
    splits: int
    stops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LongcatConfig:
    architecture: str
    raw: Mapping[str, Any]
    vocab: int
    hidden: int
    layers: int
    """Each with two attention sublayers."""
    heads: int
    intermediate: int
    expert_intermediate: int
    experts: int
    zero_experts: int
    top_k: int
    routed_scale: float
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    query_scale: float
    latent_scale: float
    eps: float
    bias: bool
    tied: bool
    max_position: int
    eos: tuple[int, ...]
    ngram: NgramConfig | None

    @classmethod
    def read(cls, config: Mapping[str, Any], architecture: str) -> LongcatConfig:
        """Raises `CheckpointError` for a field that is missing or that cannot be honoured."""
        f = Fields(config, architecture)
        f.only("hidden_act", "silu")
        f.only("attention_method", "MLA")
        f.only("zero_expert_type", "identity", None)
        f.only("norm_topk_prob", False)
        f.only("router_bias", False)
        f.only("topk_method", None)
        f.only("num_nextn_predict_layers", 1, 0, None)
        f.only("mtp_num_layers", None, 1, 0)
        f.absent(*OTHER_FEATURES)
        hidden, q_lora, kv_lora = f.size("hidden_size"), f.size("q_lora_rank"), f.size("kv_lora_rank")
        experts, zero = f.size("n_routed_experts"), f.integer("zero_expert_num", 0)
        top_k = f.size("moe_topk")
        if not 0 < top_k <= experts + zero:
            raise CheckpointError(
                f"{architecture} cannot choose moe_topk {top_k} of n_routed_experts {experts} + zero_expert_num {zero}.",
                fix="Take config.json from the model's publisher.",
            )
        eos = f.integers("eos_token_id")
        return cls(
            architecture=architecture,
            raw=config,
            vocab=f.size("vocab_size"),
            hidden=hidden,
            layers=f.size("num_layers"),
            heads=f.size("num_attention_heads"),
            intermediate=f.size("ffn_hidden_size"),
            expert_intermediate=f.size("expert_ffn_hidden_size"),
            experts=experts,
            zero_experts=zero,
            top_k=top_k,
            routed_scale=f.number("routed_scaling_factor", 1.0),
            q_lora=q_lora,
            kv_lora=kv_lora,
            nope=f.size("qk_nope_head_dim"),
            rope=f.size("qk_rope_head_dim"),
            value=f.size("v_head_dim"),
            query_scale=(hidden / q_lora) ** 0.5 if f.flag("mla_scale_q_lora", True) else 1.0,
            latent_scale=(hidden / kv_lora) ** 0.5 if f.flag("mla_scale_kv_lora", True) else 1.0,
            eps=f.number("rms_norm_eps", 1e-5),
            bias=f.flag("attention_bias", False),
            tied=f.flag("tie_word_embeddings", False),
            max_position=f.size("max_position_embeddings"),
            eos=eos,
            ngram=_ngram(f, architecture, hidden, eos[:1]),
        )

    def spec(self) -> ModelSpec:
        return ModelSpec(
            architecture=self.architecture,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            layers=self.layers,
            heads=self.heads,
            max_position=self.max_position,
            kv=KVSpec(
                kind="mla",
                layers=2 * self.layers,
                latent_dim=self.kv_lora,
                rope_dim=self.rope,
                nope_dim=self.nope,
                value_dim=self.value,
            ),
            eos_token_ids=self.eos,
            draft_kv_layers=1,
        )


def _ngram(f: Fields, architecture: str, hidden: int, stops: tuple[int, ...]) -> NgramConfig | None:
    """Lite's three fields. The hash stops at config.json's own end-of-sequence id (the first: others are added by
    generation_config.json and were unknown to training)."""
    if architecture != NGRAM:
        f.absent("ngram_vocab_size_ratio")
        return None
    read = NgramConfig(f.number("ngram_vocab_size_ratio"), f.size("emb_neighbor_num"), f.size("emb_split_num"), stops)
    tables = (read.neighbors - 1) * read.splits
    if read.neighbors < 2 or read.splits < 1 or hidden % tables or read.ratio <= 0:
        raise CheckpointError(
            f"{architecture} with emb_neighbor_num {read.neighbors}, emb_split_num {read.splits} and ngram_vocab_size_ratio "
            f"{read.ratio}: hidden_size {hidden} cannot be split over {tables} tables.",
            fix="Take config.json from the model's publisher.",
        )
    return read
