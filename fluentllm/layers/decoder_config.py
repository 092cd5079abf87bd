"""Reads what Llama-like `config.json` files have in common, and refuses by name what the decoder does not do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError
from ..core.types import KVSpec, ModelSpec
from .attention import AttentionShape
from .decoder import DecoderConfig
from .fields import Fields
from .rotary import rope_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping


def read_decoder_config(
    config: Mapping[str, Any],
    *,
    qkv_bias: bool,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sliding_window: int | None = None,
) -> DecoderConfig:
    """Raises `CheckpointError` for a missing number, an activation other than SiLU, or an unknown rope scaling.

    A sliding window is honoured by offering no longer context than it: within it, windowed and full attention are equal.
    """
    fields = Fields(config, str((config.get("architectures") or ["?"])[0]))
    fields.only("hidden_act", "silu", "swish")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    head_dim = fields.size("head_dim", hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads cannot share {kv_heads} key-value heads evenly.")
    rope = rope_parameters(config)
    rotary_dim = int(head_dim * float(rope["partial_rotary_factor"]))
    max_position = fields.size("max_position_embeddings")
    if sliding_window is not None:
        max_position = min(max_position, sliding_window)
    layers = fields.size("num_hidden_layers")
    eps = fields.number("rms_norm_eps", 1e-6)
    spec = ModelSpec(
        architecture=fields.architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        max_position=max_position,
        kv=KVSpec(kind="gqa", layers=layers, heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim),
        eos_token_ids=fields.integers("eos_token_id"),
    )
    shape = AttentionShape(hidden, heads, kv_heads, head_dim, qkv_bias, out_bias, eps if qk_norm else None)
    return DecoderConfig(
        spec=spec,
        attention=shape,
        inner=fields.size("intermediate_size"),
        norm_eps=eps,
        tied=fields.flag("tie_word_embeddings", False),
        rope=config,
        rotary_dim=rotary_dim,
        mlp_bias=mlp_bias,
    )
