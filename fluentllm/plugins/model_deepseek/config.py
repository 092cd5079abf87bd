"""What a DeepSeek config.json means: shapes, router, draft layer, and the refusals by name. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluentllm.core.errors import CheckpointError
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.layers.fields import Fields

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"


@dataclass(frozen=True, slots=True)
class DeepseekConfig:
    """The same for V2 and V3; `architecture` tells where they differ."""

    architecture: str
    raw: Mapping[str, Any]
    vocab: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    expert_intermediate: int
    dense_layers: int
    """Leading layers that have a dense MLP."""
    experts: int
    shared_experts: int
    top_k: int
    groups: int
    top_groups: int
    renormalise: bool
    routed_scale: float
    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    value: int
    eps: float
    bias: bool
    interleaved: bool
    tied: bool
    max_position: int
    eos: tuple[int, ...]
    mtp: bool
    """A draft layer may be at `model.layers.{layers}`."""

    @classmethod
    def read(cls, config: Mapping[str, Any], architecture: str) -> DeepseekConfig:
        """Raises `CheckpointError` for a field that is missing or that cannot be honoured."""
        f = Fields(config, architecture)
        v3 = architecture == V3
        f.only("hidden_act", "silu")
        f.only("moe_layer_freq", 1)
        f.only("mlp_bias", False)
        f.only("scoring_func", "sigmoid" if v3 else "softmax")
        f.only("topk_method", *(("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")))
        if not v3:
            f.only("norm_topk_prob", False)
        grouped = v3 or config.get("topk_method") == "group_limited_greedy"
        mtp_layers = f.integer("num_nextn_predict_layers", f.integer("num_mtp_layers", 0)) if v3 else 0
        if mtp_layers > 1:
            f.only("num_nextn_predict_layers", 1, 0)
        read = cls(
            architecture=architecture,
            raw=config,
            vocab=f.size("vocab_size"),
            hidden=f.size("hidden_size"),
            layers=f.size("num_hidden_layers"),
            heads=f.size("num_attention_heads"),
            intermediate=f.size("intermediate_size"),
            expert_intermediate=f.size("moe_intermediate_size"),
            dense_layers=f.integer("first_k_dense_replace", 0),
            experts=f.size("n_routed_experts"),
            shared_experts=f.integer("n_shared_experts", 0),
            top_k=f.size("num_experts_per_tok"),
            groups=f.size("n_group", 1) if grouped else 1,
            top_groups=f.size("topk_group", 1) if grouped else 1,
            renormalise=v3 and f.flag("norm_topk_prob", True),
            routed_scale=f.number("routed_scaling_factor", 1.0),
            q_lora=f.optional_integer("q_lora_rank"),
            kv_lora=f.size("kv_lora_rank"),
            nope=f.size("qk_nope_head_dim"),
            rope=f.size("qk_rope_head_dim"),
            value=f.size("v_head_dim"),
            eps=f.number("rms_norm_eps", 1e-6),
            bias=f.flag("attention_bias", False),
            interleaved=f.flag("rope_interleave", True) if v3 else True,
            tied=f.flag("tie_word_embeddings", False),
            max_position=f.size("max_position_embeddings"),
            eos=f.integers("eos_token_id"),
            mtp=mtp_layers == 1,
        )
        read._check_groups()
        return read

    def _check_groups(self) -> None:
        fits = (
            0 < self.top_groups <= self.groups
            and self.experts % self.groups == 0
            and 0 < self.top_k <= self.top_groups * (self.experts // self.groups)
            and (self.groups == 1 or self.architecture == V2 or self.experts // self.groups >= 2)
        )
        if not fits:
            raise CheckpointError(
                f"{self.architecture} cannot choose num_experts_per_tok {self.top_k} of n_routed_experts {self.experts} "
                f"with n_group {self.groups} and topk_group {self.top_groups}.",
                fix="Take config.json from the model's publisher.",
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
                layers=self.layers,
                latent_dim=self.kv_lora,
                rope_dim=self.rope,
                nope_dim=self.nope,
                value_dim=self.value,
            ),
            eos_token_ids=self.eos,
            draft_kv_layers=1 if self.mtp else 0,
        )
