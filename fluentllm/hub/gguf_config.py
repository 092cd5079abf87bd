"""Makes a Hugging Face configuration from a GGUF's metadata, for the Llama and Qwen layouts.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a layout says and we do not know is refused by
name, never ignored.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError
from .gguf_file import read_floats

if TYPE_CHECKING:
    from .gguf_file import GGUFHeader

LAYOUTS = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""GGUF's `general.architecture` → Hugging Face's architecture and model_type."""

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the divisors of Llama 3's rotary frequencies: part of the configuration, not a weight."""

_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>")
"""Control tokens that end a turn even where the metadata names another end of sequence."""
_CONTROL = 3


def config_from_header(header: GGUFHeader) -> dict[str, Any]:
    """As config.json would have it. Raises `CheckpointError` for layouts and rope scalings that are not known."""
    keys = _Keys(header)
    layout = header.metadata.get("general.architecture")
    if layout not in LAYOUTS:
        raise CheckpointError(
            f"{header.path.name} has the GGUF layout {layout!r}; known are {', '.join(LAYOUTS)}.",
            fix="Use the model's safetensors, or a GGUF of a known layout.",
        )
    name, model_type = LAYOUTS[layout]
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{header.path.name} has values of another width than keys, which {layout} cannot have.")
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", 0),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.short_float("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.short_float("rope.freq_base", 10000.0),
        "max_position_embeddings": keys.integer("context_length"),
        "vocab_size": header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "rope_scaling": _rope_scaling(header, keys),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(header.metadata),
    }
    if not config["vocab_size"]:
        raise CheckpointError(f"{header.path.name} has no tensor 'token_embd.weight'.")
    rotary = keys.integer("rope.dimension_count", head_dim)
    if rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    window = keys.integer("attention.sliding_window", 0)
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True}
    _experts(config, header, keys, layout)
    return config


def _experts(config: dict[str, Any], header: GGUFHeader, keys: _Keys, layout: str) -> None:
    count = keys.integer("expert_count", 0)
    if layout == "qwen3moe":
        config |= {
            "num_experts": count,
            "num_experts_per_tok": keys.integer("expert_used_count"),
            "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
            "intermediate_size": config["intermediate_size"] or keys.integer("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    elif count:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": count}


def _rope_scaling(header: GGUFHeader, keys: _Keys) -> dict[str, Any] | None:
    if ROPE_FACTORS in header.tensors:
        return _llama3(header)
    for tensor in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if tensor in header.tensors:
            raise CheckpointError(
                f"{header.path.name} scales rotary positions by 'longrope' ({tensor}), which is not supported."
            )
    kind = keys.get("rope.scaling.type")
    old = keys.get("rope.scale_linear")
    if kind is None and old not in (None, 1.0):
        return {"rope_type": "linear", "factor": float(old)}
    if kind in (None, "none"):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.short_float("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    if kind != "yarn":
        raise CheckpointError(f"{header.path.name} scales rotary positions by {kind!r}; known are linear, yarn and llama3.")
    original = keys.get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    for theirs, ours in (("attn_factor", "attention_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
        value = keys.get(f"rope.scaling.yarn_{theirs}", keys.get(f"rope.scaling.{theirs}"))
        if value is not None:
            scaling[ours] = _shortest(value)
    return scaling


def _llama3(header: GGUFHeader) -> dict[str, Any]:
    """The parameters of Llama 3's scaling, found again from the divisors that the GGUF keeps instead of them.

    All public checkpoints have low 1, high 4 and original length 8192; the factor is the largest divisor. That these
    four give the file's divisors is checked, so that another scaling is refused.
    """
    divisors = read_floats(header, header.tensors[ROPE_FACTORS])
    theta = float(header.metadata.get("llama.rope.freq_base", 10000.0))
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(max(divisors, default=1.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_divisors(scaling, theta, 2 * len(divisors))
    if any(not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(divisors, expected, strict=True)):
        raise CheckpointError(f"{header.path.name} has rotary divisors in {ROPE_FACTORS!r} that are not Llama 3's.")
    return scaling


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> list[float]:
    """By what Llama 3's scaling divides each of the head_dim/2 frequencies (Llama 3.1's `apply_scaling`)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _end_ids(metadata: dict[str, Any]) -> list[int]:
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    ends = [i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL and token in _TURN_ENDS]
    return list(dict.fromkeys(int(i) for i in [*ids, *ends] if i is not None))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-5, not 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return float(value)


class _Keys:
    """The layout's own metadata keys, such as `llama.block_count`."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.prefix = str(header.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.prefix}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and default != 0):
            raise CheckpointError(
                f"{self.header.path.name} has {value!r} as '{self.prefix}.{key}' where one integer is needed."
            )
        return value

    def short_float(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.header.path.name} has {value!r} as '{self.prefix}.{key}' where a number is needed.")
        return _shortest(value)
