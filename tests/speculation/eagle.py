"""Tiny EAGLE and EAGLE-3 drafts in the public layouts, and what they must draft: written out in plain torch, from scratch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from engine.harness import TINY_LLAMA, Harness
from engine.test_every_model import LONGCAT, MODELS
from safetensors.torch import save_file

from .mtp import write_checkpoint
from .watching import Primed, WholeSequence, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from fluentllm.core.protocols import Model

HIDDEN, VOCAB, DRAFT_VOCAB = 64, 160, 70
TARGETS: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "longcat": LONGCAT,
    "deepseek_v3": {**MODELS["deepseek_v3"], "num_nextn_predict_layers": 0},
    "mla": {**MODELS["deepseek_v3"], "num_nextn_predict_layers": 0, "first_k_dense_replace": 2},
}
DRAFT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
DRAFTS: dict[str, dict[str, Any]] = {
    "eagle": {**DRAFT, "bias": False},
    "eagle3": {
        **DRAFT,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": DRAFT_VOCAB,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    },
}


def draft_tensors(kind: str, seed: int = 1) -> dict[str, Tensor]:
    """Random weights under the names of the papers' checkpoints, so large that attention decides what comes out."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.25

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=generator)

    layer, inputs = ("layers.0", HIDDEN) if kind == "eagle" else ("midlayer", 2 * HIDDEN)
    tensors = {
        f"{layer}.self_attn.q_proj.weight": matrix(64, inputs),
        f"{layer}.self_attn.k_proj.weight": matrix(32, inputs),
        f"{layer}.self_attn.v_proj.weight": matrix(32, inputs),
        f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, 64),
        f"{layer}.post_attention_layernorm.weight": norm(),
        f"{layer}.mlp.gate_proj.weight": matrix(80, HIDDEN),
        f"{layer}.mlp.up_proj.weight": matrix(80, HIDDEN),
        f"{layer}.mlp.down_proj.weight": matrix(HIDDEN, 80),
    }
    if kind == "eagle":
        # With an embedding of its own.
        return {**tensors, "fc.weight": matrix(HIDDEN, 2 * HIDDEN), "embed_tokens.weight": matrix(VOCAB, HIDDEN)}
    kept = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[kept] = True
    return {
        **tensors,
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.hidden_norm.weight": norm(),
        "fc.weight": matrix(HIDDEN, 3 * HIDDEN),
        "norm.weight": norm(),
        "lm_head.weight": matrix(DRAFT_VOCAB, HIDDEN),
        "d2t": kept - torch.arange(DRAFT_VOCAB),
        "t2d": known,
    }


def write_draft(folder: Path, kind: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**DRAFTS[kind], **changes}))
    save_file(draft_tensors(kind) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def harness(folder: Path, kind: str, target: str, **overrides: Any) -> Harness:
    settings = {"model.load_format": "safetensors", "engine.deterministic": True, "kv.page_size": 8}
    settings |= {"speculative.method": "eagle", "speculative.max_k": 5}
    settings["speculative.model"] = str(write_draft(folder / "draft", kind))
    return Harness(write_checkpoint(folder / "target", TARGETS[target]), **{**settings, **overrides})


class Reference(Primed):
    """Scores of a draft model's drafts after a history, from nothing but the tokens: the pairs (state of position t, token at
    t + 1) are the inputs, at positions 0, 1, …, as in the papers' code."""

    def __init__(
        self, model: Model, kind: str, weights: Mapping[str, Tensor] | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """`weights`, `config`: of a draft that is not the tiny one."""
        super().__init__()
        self._model: Any = model
        self._eagle3 = kind == "eagle3"
        self._weights = draft_tensors(kind) if weights is None else weights
        self._prefix = "midlayer" if self._eagle3 else "layers.0"
        config = DRAFTS[kind] if config is None else config
        heads, layers = config["num_attention_heads"], model.spec.layers
        self._size = config.get("head_dim") or config["hidden_size"] // heads
        self._group = heads // config["num_key_value_heads"]
        self._theta, self._eps = config["rope_theta"], config["rms_norm_eps"]
        self._taps = config.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]

    @torch.inference_mode()
    def scores(self, history: list[int], drafts: list[int]) -> Tensor:
        states, tokens = self.states(history[:-1]), history[1:]
        rows = []
        for draft in drafts:
            out = self._layer(states, tokens)[-1:]
            rows.append(self._logits(out))
            states, tokens = torch.cat((states, out)), [*tokens, draft]
        return torch.cat(rows)

    def compute(self, tokens: list[int]) -> Tensor:
        batch = whole(tokens)
        self._model.tap(self._taps if self._eagle3 else [])
        hidden: Tensor = self._model.forward(batch, WholeSequence())
        return torch.cat(batch.layer_inputs, -1) @ self._weights["fc.weight"].T if self._eagle3 else hidden

    def _layer(self, states: Tensor, tokens: list[int]) -> Tensor:
        if self._eagle3:
            embedded = self._norm(self._model.embedding.table[tokens], "midlayer.input_layernorm")
            x, residual = torch.cat((embedded, self._norm(states, "midlayer.hidden_norm")), -1), states
        else:
            x = torch.cat((self._weights["embed_tokens.weight"][tokens], states), -1) @ self._weights["fc.weight"].T
            residual = x
        x = residual + self._attention(x)
        y = self._norm(x, f"{self._prefix}.post_attention_layernorm")
        gate, up, down = (self._weights[f"{self._prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            (x @ self._weights[f"{self._prefix}.self_attn.{name}_proj.weight"].T).unflatten(1, (-1, self._size))
            for name in "qkv"
        )
        count, size = len(x), self._size
        angles = torch.outer(torch.arange(count).float(), self._theta ** (-torch.arange(0, size, 2).float() / size))
        cos, sin = (torch.cat((t, t), -1).unsqueeze(1) for t in (angles.cos(), angles.sin()))

        def rotate(y: Tensor) -> Tensor:
            half = torch.cat((-y[..., size // 2 :], y[..., : size // 2]), -1)
            return y * cos + half * sin

        group = self._group
        scores = torch.einsum("qhd,thd->hqt", rotate(q), rotate(k).repeat_interleave(group, 1)) / size**0.5
        weights = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf")).softmax(-1)
        out = torch.einsum("hqt,thd->qhd", weights, v.repeat_interleave(group, 1)).flatten(1)
        return out @ self._weights[f"{self._prefix}.self_attn.o_proj.weight"].T

    def _logits(self, states: Tensor) -> Tensor:
        if not self._eagle3:
            logits: Tensor = self._model.logits(states)
            return logits
        logits = torch.full((len(states), self._model.spec.vocab_size), float("-inf"))
        drafted = self._norm(states, "norm") @ self._weights["lm_head.weight"].T
        logits[:, torch.arange(drafted.shape[1]) + self._weights["d2t"]] = drafted
        return logits

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self._eps).rsqrt() * self._weights[f"{name}.weight"]
