"""From GGUF's tensor names and row order to Hugging Face's, for the Llama and Qwen layouts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluentllm.core.errors import CheckpointError
from fluentllm.hub.gguf_config import ROPE_FACTORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.hub.gguf_file import GGUFHeader, GGUFTensor

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a Hugging Face tensor comes from."""

    tensor: GGUFTensor
    shape: tuple[int, ...]
    """Of the Hugging Face tensor."""
    expert: int | None = None
    """Which slice of a stack of experts."""
    heads: int = 0
    """If not 0, rows are interleaved within each of so many heads, see `row_order`."""


def sources(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Source]:
    """Hugging Face name → source, in file order. Raises `CheckpointError` for a tensor of an unknown name."""
    permuted = {}
    if header.metadata.get("general.architecture") == "llama":
        permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found: dict[str, Source] = {}
    for tensor in header.tensors.values():
        if tensor.name == ROPE_FACTORS:
            continue
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise _unknown(header, tensor)
        layer, part, kind = match["layer"], match["part"], match["kind"]
        if layer is None:
            if part not in _TOP:
                raise _unknown(header, tensor)
            found[f"{_TOP[part]}.{kind}"] = Source(tensor, tensor.shape)
        elif part in _EXPERTS:
            for expert in range(tensor.shape[0]):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{_EXPERTS[part]}.{kind}"
                found[name] = Source(tensor, tensor.shape[1:], expert=expert)
        elif part in _BLOCK:
            found[f"model.layers.{layer}.{_BLOCK[part]}.{kind}"] = Source(tensor, tensor.shape, heads=permuted.get(part, 0))
        else:
            raise _unknown(header, tensor)
    return found


def row_order(rows: int, heads: int) -> list[int]:
    """Which row of the GGUF is row i of Hugging Face's q or k projection.

    The Llama layout keeps the two rows that rotary turns together next to each other (2j, 2j + 1); Hugging Face keeps
    them half a head apart (j, j + d/2).
    """
    size = rows // heads
    half = size // 2
    return [head * size + 2 * j + side for head in range(heads) for side in (0, 1) for j in range(half)]


def _unknown(header: GGUFHeader, tensor: GGUFTensor) -> CheckpointError:
    layout = header.metadata.get("general.architecture")
    return CheckpointError(
        f"{header.path.name} has the tensor {tensor.name!r} {list(tensor.shape)}, unknown in the {layout} layout.",
        fix="Use the model's safetensors.",
    )
