"""The model that the head drafts for, a Llama read from a GGUF file: its answers, and the states that the head reads."""

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
        self.taken = (2, self.layers // 2, self.layers - 3)
        """At the input of these layers the head reads the states."""
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.head = self.weights.get("lm_head.weight", self.embedding)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T], padded behind → the three states side by side [B, T, 3 · hidden], and the last after its norm."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), is_causal=True)

        rows = rotary(tokens.shape[1], self.size, self.theta, self.device)
        return self._forward(tokens, rows, attend)

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], new: int, temperatures: Tensor, ends: tuple[int, ...]) -> list[list[int]]:
        """Up to `new` tokens after each prompt, the end token included; temperatures [B], 0 is greedy."""
        batch, width = len(prompts), max(map(len, prompts))
        pads = torch.tensor([width - len(prompt) for prompt in prompts], device=self.device)
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        shape = self.layers, batch, self.kv_heads, width + new, self.size
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        columns = torch.arange(width + new, device=self.device)
        cos, sin = rotary(width + new, self.size, self.theta, self.device)
        last = torch.tensor(ends, device=self.device)
        finished = torch.zeros(batch, dtype=torch.bool, device=self.device)
        found: list[Tensor] = []
        done = 0
        while True:
            count = tokens.shape[1]
            seen = columns[: done + count]
            queries = columns[done : done + count]
            mask = (seen <= queries.unsqueeze(1)) & (seen >= pads.view(-1, 1, 1))
            mask = (mask | (seen == queries.unsqueeze(1))).unsqueeze(1)  # padding sees itself, lest softmax divide by zero
            # Rotary cares for distances only, so the padding in front may count.
            rows = cos[done : done + count], sin[done : done + count]

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, done: int = done, mask: Tensor = mask) -> Tensor:
                end = done + k.shape[2]
                keys[layer, :, :, done:end] = k
                values[layer, :, :, done:end] = v
                k, v = keys[layer, :, :, :end], values[layer, :, :, :end]
                if q.shape[2] > 1:
                    return F.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), attn_mask=mask)
                grouped = q.view(batch, self.kv_heads, -1, self.size)
                scores = (grouped @ k.transpose(2, 3)).float() * self.size**-0.5
                shares = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
                return (shares @ v).view(batch, self.heads, 1, self.size)

            _, hidden = self._forward(tokens, rows, attend)
            logits = (hidden[:, -1] @ self.head.T).float()
            if bool((temperatures > 0).any()):
                noise = -torch.empty_like(logits).exponential_().log()
                logits += temperatures.unsqueeze(1) * noise
            chosen = logits.argmax(-1)
            found.append(chosen)
            finished |= (chosen.unsqueeze(1) == last).any(1)
            done += count
            if len(found) == new or (len(found) % 16 == 0 and bool(finished.all())):
                break
            tokens = chosen.unsqueeze(1)
        answers = []
        for row in torch.stack(found, 1).tolist():
            cut = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:cut])
        return answers

    def _forward(self, tokens: Tensor, rows: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor]:
        x = F.embedding(tokens, self.embedding)
        taken = []
        for layer in range(self.layers):
            if layer in self.taken:
                taken.append(x)
            h = self._norm(x, f"model.layers.{layer}.input_layernorm")
            q, k, v = (
                self._linear(h, layer, f"self_attn.{name}_proj").unflatten(-1, (-1, self.size)).transpose(1, 2)
                for name in "qkv"
            )
            h = attend(layer, turn(q, rows), turn(k, rows), v)  # type: ignore[operator]
            x = x + self._linear(h.transpose(1, 2).flatten(2), layer, "self_attn.o_proj")
            h = self._norm(x, f"model.layers.{layer}.post_attention_layernorm")
            h = F.silu(self._linear(h, layer, "mlp.gate_proj")) * self._linear(h, layer, "mlp.up_proj")
            x = x + self._linear(h, layer, "mlp.down_proj")
        return torch.cat(taken, -1), self._norm(x, "model.norm")

    def _linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        return F.linear(x, self.weights[f"model.layers.{layer}.{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(self.dtype)

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, 1)


def turn(x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., T, size]: rotate pairs that lie half a head apart."""
    cos, sin = rows
    one, other = x.float().chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1).to(x.dtype)
