"""An EAGLE-3 draft head in torch, under the names of the public checkpoints (arXiv:2503.01840; `LlamaForCausalLMEagle3`).

One decoder layer, whose q, k and v read the normed embedding beside the normed state. At depth 1 the state is `fc` of the
target's three; deeper it is the layer's own output. It has a small vocabulary: the target's most frequent tokens.

The target's channels differ in size by a factor of hundreds (its late states are ten times its early ones, and a few channels
twenty times the others). So while it is trained, `fc` reads each in units of its root mean square; what is written has that in
`fc.weight`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..drafting import back_by_one, chain_attention, rotary
from .target import Target, turn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes are the target's, but for the vocabulary and the MLP."""

    vocab: int
    draft_vocab: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    size: int
    theta: float
    eps: float
    max_position: int


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(2 * s.hidden, s.heads * s.size, bias=False)
        self.k_proj = nn.Linear(2 * s.hidden, s.kv_heads * s.size, bias=False)
        self.v_proj = nn.Linear(2 * s.hidden, s.kv_heads * s.size, bias=False)
        self.o_proj = nn.Linear(s.heads * s.size, s.hidden, bias=False)

    def forward(self, x: Tensor, rows: tuple[Tensor, Tensor], before: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`before` holds keys and values of the depths before, and gets this one's (see `drafting`)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.s.size)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        groups = self.s.heads // self.s.kv_heads
        before.append((turn(k, rows).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        out = chain_attention(turn(q, rows), [k for k, _ in before], [v for _, v in before], self.s.size**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        """Of the embedding."""
        self.hidden_norm = RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.mlp = MLP(s.hidden, s.inner)

    def forward(
        self, words: Tensor, states: Tensor, rows: tuple[Tensor, Tensor], before: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        x = torch.cat((self.input_layernorm(words), self.hidden_norm(states)), -1)
        states = states + self.self_attn(x, rows, before)
        return states + self.mlp(self.post_attention_layernorm(states))


class Head(nn.Module):
    d2t: Tensor
    t2d: Tensor
    units: Tensor

    def __init__(self, s: Shape, kept: Tensor) -> None:
        """kept [draft_vocab] int64, rising: the target's tokens that it knows."""
        super().__init__()
        self.s = s
        self.fc = nn.Linear(3 * s.hidden, s.hidden, bias=False)
        self.midlayer = Layer(s)
        self.norm = RMSNorm(s.hidden, s.eps)
        self.lm_head = nn.Linear(s.hidden, s.draft_vocab, bias=False)
        self.register_buffer("d2t", kept - torch.arange(s.draft_vocab, device=kept.device))
        self.register_buffer("t2d", torch.zeros(s.vocab, dtype=torch.bool, device=kept.device).index_fill(0, kept, True))
        self.register_buffer("units", torch.ones(3 * s.hidden, device=kept.device), persistent=False)
        """What the target's states are divided by, [3 · hidden]."""

    @property
    def kept(self) -> Tensor:
        return self.d2t + torch.arange(self.s.draft_vocab, device=self.d2t.device)

    @torch.no_grad()
    def begin_from(self, target: Target) -> None:
        """Start with the target's own vectors for the tokens, of the usual size. (Its layers are no good start: they predict
        a token earlier.)"""
        vectors = target.head[self.kept].float()
        self.lm_head.weight.copy_(vectors * (self.lm_head.weight.std() / vectors.std()))

    @torch.no_grad()
    def measure_units(self, states: Tensor) -> None:
        """states [N, 3 · hidden] of ordinary rows: now `fc` reads them in units of their size, and computes the same."""
        units = states.float().square().mean(0).sqrt().clamp_min(1e-6)
        self.fc.weight.mul_(units / self.units)
        self.units.copy_(units)

    def forward(self, words: Tensor, states: Tensor, depths: int) -> list[Tensor]:
        """words [B, T, hidden] embeddings; states [B, T, 3 · hidden] the target's → each depth's rows as the head reads them:
        [B, T, hidden] each. The first token, which has no state before it, has no row."""
        rows = rotary(words.shape[1], self.s.size, self.s.theta, words.device)
        rows = rows[0][1:], rows[1][1:]
        at = self.fc(states[:, :-1] / self.units).float()
        words = words[:, 1:]
        before: list[tuple[Tensor, Tensor]] = []
        found = []
        for depth in range(depths):
            at = self.midlayer(words, back_by_one(at) if depth else at, rows, before)
            found.append(F.pad(self.norm(at), (0, 0, 1, 0)))
        return found


def config(s: Shape, target: Target) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": target.config.get("bos_token_id"),
        "draft_vocab_size": s.draft_vocab,
        "eos_token_id": target.config.get("eos_token_id"),
        "head_dim": s.size,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "intermediate_size": s.inner,
        "max_position_embeddings": s.max_position,
        "mlp_bias": False,
        "num_attention_heads": s.heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": s.eps,
        "rope_theta": s.theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": s.vocab,
    }


def save(head: Head, target: Target, folder: Path, shard_bytes: int) -> int:
    """In files of at most `shard_bytes`, with an index if there are several; → bytes of all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(head.s, target), indent=2, sort_keys=True) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in head.state_dict().items():
        kept = (tensor / head.units if name == "fc.weight" else tensor).detach().cpu()
        kept = (kept.to(torch.bfloat16) if kept.is_floating_point() else kept).contiguous()
        if shards[-1] and size + kept.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = kept
        size += kept.nbytes
        total += kept.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, str(folder / file), {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors lets only the owner read
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def load(folder: Path) -> Head:
    """What `save` wrote, in float32."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(str(file))
    known = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab=known["vocab_size"],
        draft_vocab=known["draft_vocab_size"],
        hidden=known["hidden_size"],
        inner=known["intermediate_size"],
        heads=known["num_attention_heads"],
        kv_heads=known["num_key_value_heads"],
        size=known["head_dim"],
        theta=known["rope_theta"],
        eps=known["rms_norm_eps"],
        max_position=known["max_position_embeddings"],
    )
    head = Head(shape, torch.arange(shape.draft_vocab))
    head.load_state_dict(stored)
    return head.float().eval()
