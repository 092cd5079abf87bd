"""The model that the head drafts for, a Llama read from a GGUF file, and the states that the head reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fluentllm.plugins.weights_gguf.checkpoint import GGUFCheckpoint

from ..drafting import rotary

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v, each [B, heads, T, size], rotated) → [B, heads, T, size]."""


class Target:
    """Weights in `dtype`; everything is computed in it, but for norms, rotary and softmax."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        checkpoint = GGUFCheckpoint(path)
        self.config = dict(checkpoint.config)
        self.weights = {name: checkpoint.read(name, device).to(dtype) for name in checkpoint.shapes()}
        checkpoint.close()
        self.device, self.dtype = device, dtype
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.kv_heads = int(self.config["num_key_value_heads"])
        self.size = int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)
        self.theta = float(self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"])
        self.eps = float(self.config["rms_norm_eps"])
        self._join("self_attn", ("q", "k", "v"), "qkv")
        self._join("mlp", ("gate", "up"), "gate_up")
        self.taken = (2, self.layers // 2, self.layers - 3)
        """At the input of these layers the head reads the states."""
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.head = self.weights.get("lm_head.weight", self.embedding)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T], padded behind → the three states side by side [B, T, 3 · hidden], and the last after its norm."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), is_causal=True)

        rows = rotary(tokens.shape[1], self.size, self.theta, self.device)
        taken, last = self.forward(tokens, rows, attend)
        return torch.cat(taken, -1), last

    def forward(self, tokens: Tensor, rows: tuple[Tensor, Tensor], attend: Attend) -> tuple[list[Tensor], Tensor]:
        """tokens [B, T], rows of `rotary` → the states that the head reads, and the last after its norm, [B, T, hidden]."""
        x = F.embedding(tokens, self.embedding)
        taken = []
        for layer in range(self.layers):
            if layer in self.taken:
                taken.append(x)
            h = self._norm(x, f"model.layers.{layer}.input_layernorm")
            h = self._linear(h, layer, "self_attn.qkv_proj").unflatten(-1, (-1, self.size)).transpose(1, 2)
            q, k, v = h.split([self.heads, self.kv_heads, self.kv_heads], 1)
            h = attend(layer, turn(q, rows), turn(k, rows), v)  # type: ignore[operator]
            x = x + self._linear(h.transpose(1, 2).flatten(2), layer, "self_attn.o_proj")
            h = self._norm(x, f"model.layers.{layer}.post_attention_layernorm")
            gate, up = self._linear(h, layer, "mlp.gate_up_proj").chunk(2, -1)
            h = F.silu(gate) * up
            x = x + self._linear(h, layer, "mlp.down_proj")
        return taken, self._norm(x, "model.norm")

    def _join(self, block: str, names: tuple[str, ...], joined: str) -> None:
        """One matrix for those that read the same: fewer kernels a layer."""
        for layer in range(self.layers):
            stem = f"model.layers.{layer}.{block}."
            self.weights[f"{stem}{joined}_proj.weight"] = torch.cat(
                [self.weights.pop(f"{stem}{name}_proj.weight") for name in names]
            )

    def _linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        return F.linear(x, self.weights[f"model.layers.{layer}.{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, 1)


def turn(x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., T, size]: rotate pairs that lie half a head apart."""
    cos, sin = rows
    one, other = x.float().chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1).to(x.dtype)
