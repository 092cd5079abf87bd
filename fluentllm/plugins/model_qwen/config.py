"""What Qwen configs say beside the common: biases, normed heads, sliding windows, which layers have experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.layers.decoder_config import read_decoder_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.layers.decoder import DecoderConfig


def read_config(kind: str, config: Mapping[str, Any]) -> DecoderConfig:
    """`kind` is qwen2, qwen3 or qwen3_moe. Raises `CheckpointError`."""
    bias = bool(config.get("attention_bias", False))
    return read_decoder_config(
        config,
        qkv_bias=kind == "qwen2" or bias,
        out_bias=kind != "qwen2" and bias,
        qk_norm=kind != "qwen2",
        sliding_window=_window(config),
    )


def _window(config: Mapping[str, Any]) -> int | None:
    """The window, where the config switches it on for any layer."""
    if not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window")
    layers = config.get("layer_types")
    if layers is not None:
        return window if "sliding_attention" in layers else None
    first = config.get("max_window_layers")
    return window if first is None or first < config["num_hidden_layers"] else None


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Layers with experts: every `decoder_sparse_step`-th, but those named in `mlp_only_layers`."""
    step = int(config.get("decoder_sparse_step") or 1)
    dense = config.get("mlp_only_layers") or []
    return layer not in dense and bool(expert_count(config)) and (layer + 1) % step == 0


def expert_count(config: Mapping[str, Any]) -> int | None:
    """`num_experts`, which Transformers writes as `num_local_experts` since version 5."""
    count: int | None = config.get("num_experts", config.get("num_local_experts"))
    return count
