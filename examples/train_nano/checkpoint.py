"""A trained model as a folder in the public layout of LongCat-Flash: what `fluent serve` and Transformers read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .data import END
from .model import Longcat, Shape

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""The model continues source text; it was never taught to chat."""
_STACK = re.compile(r"(.*\.mlp)\.(gate|up|down)")


def config(s: Shape) -> dict[str, Any]:
    known: dict[str, Any] = {
        "architectures": ["LongcatFlashNgramForCausalLM" if s.ngram_ratio else "LongcatFlashForCausalLM"],
        "model_type": "longcat_flash_ngram" if s.ngram_ratio else "longcat_flash",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_method": "MLA",
        "bos_token_id": s.eos,
        "eos_token_id": s.eos,
        "expert_ffn_hidden_size": s.expert,
        "ffn_hidden_size": s.dense,
        "head_dim": s.rope,  # Transformers takes the rotary size from here
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "kv_lora_rank": s.kv_lora,
        "max_position_embeddings": s.max_position,
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "moe_topk": s.top_k,
        "n_routed_experts": s.experts,
        "norm_topk_prob": False,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "num_layers": s.layers,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": s.q_lora,
        "qk_nope_head_dim": s.nope,
        "qk_rope_head_dim": s.rope,
        "rms_norm_eps": s.eps,
        "rope_theta": s.theta,
        "routed_scaling_factor": s.routed_scale,
        "router_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "v_head_dim": s.value,
        "vocab_size": s.vocab,
        "zero_expert_num": s.zero_experts,
        "zero_expert_type": "identity",
    }
    if s.ngram_ratio:
        known |= {
            "ngram_vocab_size_ratio": s.ngram_ratio,
            "emb_neighbor_num": s.ngram_neighbors,
            "emb_split_num": s.ngram_splits,
        }
    return known


def save(model: Longcat, tokenizer: Tokenizer, folder: Path) -> int:
    """Write everything; → bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.json": config(model.s),
        "generation_config.json": {"bos_token_id": model.s.eos, "eos_token_id": model.s.eos, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.s.max_position,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = folder / "model.safetensors"
    save_file(_tensors(model), str(weights), {"format": "pt"})
    weights.chmod(0o644)  # safetensors lets only the owner read
    return weights.stat().st_size


def _tensors(model: Longcat) -> dict[str, Tensor]:
    """BF16, the router float32."""
    found = {}
    for name, tensor in model.state_dict().items():
        stack = _STACK.fullmatch(name)
        kept = tensor.detach().cpu().to(torch.float32 if ".router." in name else torch.bfloat16)
        if stack:
            for number, matrix in enumerate(kept):
                found[f"model.{stack[1]}.experts.{number}.{stack[2]}_proj.weight"] = matrix.clone()
        else:
            found[f"model.{name}"] = kept.contiguous()
    return found


def load(shape: Shape, folder: Path) -> Longcat:
    """What `save` wrote, in float32."""
    stored = load_file(str(folder / "model.safetensors"))
    model = Longcat(shape)
    state = {}
    for name in model.state_dict():
        stack = _STACK.fullmatch(name)
        if stack:
            one = f"model.{stack[1]}.experts.{{}}.{stack[2]}_proj.weight"
            state[name] = torch.stack([stored.pop(one.format(number)) for number in range(shape.experts)])
        else:
            state[name] = stored.pop(f"model.{name}")
    assert not stored, f"unknown tensors: {sorted(stored)}"
    model.load_state_dict(state)
    return model.float().eval()
