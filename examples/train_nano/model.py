"""LongCat-Flash as plain torch, in the shapes and under the names of its checkpoints, for training.

Every layer has two attentions (MLA), two dense MLPs, and one mixture of experts on a shortcut around the middle. Experts are
computed for all tokens, which is fastest at this size. `fluentllm/plugins/model_longcat` is the same network for serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drafting import back_by_one, chain_attention, rotary

LATENT_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    vocab: int = 8192
    hidden: int = 128
    layers: int = 2
    heads: int = 8
    q_lora: int = 32
    kv_lora: int = 512
    nope: int = 32
    rope: int = 64
    value: int = 32
    dense: int = 256
    """Inner size of the dense MLPs."""
    expert: int = 64
    experts: int = 8
    zero_experts: int = 4
    top_k: int = 3
    routed_scale: float = 2.0
    theta: float = 10000.0
    eps: float = 1e-5
    max_position: int = 1024
    ngram_ratio: float = 0.0
    """Rows of an n-gram table / vocab; 0: no n-gram embedding."""
    ngram_neighbors: int = 3
    ngram_splits: int = 4
    eos: int = 0
    dropout: float = 0.1


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class MLA(nn.Module):
    """Multi-head latent attention, expanded. Rotary turns neighbouring pairs."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_a_proj = nn.Linear(s.hidden, s.q_lora, bias=False)
        self.q_a_layernorm = RMSNorm(s.q_lora, LATENT_EPS)
        self.q_b_proj = nn.Linear(s.q_lora, s.heads * (s.nope + s.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(s.hidden, s.kv_lora + s.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(s.kv_lora, LATENT_EPS)
        self.kv_b_proj = nn.Linear(s.kv_lora, s.heads * (s.nope + s.value), bias=False)
        self.o_proj = nn.Linear(s.heads * s.value, s.hidden, bias=False)

    def forward(self, x: Tensor, rows: tuple[Tensor, Tensor], before: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`before` holds keys and values of the depths before, and gets this one's (see `drafting`)."""
        s = self.s
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)) * (s.hidden / s.q_lora) ** 0.5)
        q_nope, q_rope = q.unflatten(-1, (s.heads, -1)).transpose(1, 2).split([s.nope, s.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([s.kv_lora, s.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent) * (s.hidden / s.kv_lora) ** 0.5)
        k_nope, value = kv.unflatten(-1, (s.heads, -1)).transpose(1, 2).split([s.nope, s.value], -1)
        k_rope = turn(k_rope.unsqueeze(1), rows).expand(-1, s.heads, -1, -1)
        q = torch.cat((q_nope, turn(q_rope, rows).to(q_nope.dtype)), -1)
        before.append((torch.cat((k_nope, k_rope.to(k_nope.dtype)), -1), value))
        out = chain_attention(q, [k for k, _ in before], [v for _, v in before], (s.nope + s.rope) ** -0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Softmax over routed and zero experts. The bias takes part in the choice only, and is what balances the load: it is no
    parameter, but is raised for experts that got too few tokens (arXiv:2408.15664)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.classifier = nn.Linear(s.hidden, s.experts + s.zero_experts, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(s.experts + s.zero_experts))
        self.register_buffer("load", torch.zeros(s.experts + s.zero_experts), persistent=False)
        """Share of the choices that each got in the last pass."""

    def forward(self, u: Tensor) -> Tensor:
        """u [B, T, hidden] → weight of each expert [B, T, experts + zero experts] float32, 0 where not chosen."""
        with torch.autocast(u.device.type, enabled=False):
            scores = F.linear(u.float(), self.classifier.weight.float()).softmax(-1)
        chosen = (scores + self.e_score_correction_bias).topk(self.s.top_k, -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        if self.training:
            self.load = mask.detach().mean((0, 1)) / self.s.top_k
        return scores * mask * self.s.routed_scale

    def balance(self, rate: float) -> None:
        self.e_score_correction_bias += rate * (1 / self.load.shape[0] - self.load).sign()


class MoE(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.router = Router(s)
        self.gate = nn.Parameter(torch.empty(s.experts, s.expert, s.hidden))
        self.up = nn.Parameter(torch.empty(s.experts, s.expert, s.hidden))
        self.down = nn.Parameter(torch.empty(s.experts, s.hidden, s.expert))

    def forward(self, u: Tensor) -> Tensor:
        weights = self.router(u)
        inner = F.silu(torch.einsum("bth,eih->btei", u, self.gate)) * torch.einsum("bth,eih->btei", u, self.up)
        inner = inner * weights[..., : self.s.experts, None].to(inner.dtype)
        out = torch.einsum("btei,ehi->bth", inner, self.down)
        return out + weights[..., self.s.experts :].sum(-1, keepdim=True) * u


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.ModuleList(RMSNorm(s.hidden, s.eps) for _ in range(2))
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(s.hidden, s.eps) for _ in range(2))
        self.self_attn = nn.ModuleList(MLA(s) for _ in range(2))
        self.mlps = nn.ModuleList(MLP(s.hidden, s.dense) for _ in range(2))
        self.mlp = MoE(s)
        self.drop = nn.Dropout(s.dropout)

    def forward(self, x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        a = x + self.drop(self.self_attn[0](self.input_layernorm[0](x), rows, []))
        u = self.post_attention_layernorm[0](a)
        shortcut = self.mlp(u)
        b = a + self.drop(self.mlps[0](u))
        c = b + self.drop(self.self_attn[1](self.input_layernorm[1](b), rows, []))
        return c + self.drop(self.mlps[1](self.post_attention_layernorm[1](c)) + shortcut)


class MTPLayer(nn.Module):
    """One dense layer on the token and the hidden state before it."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.enorm = nn.ModuleDict({"m": RMSNorm(s.hidden, s.eps)})
        self.hnorm = nn.ModuleDict({"m": RMSNorm(s.hidden, s.eps)})
        self.eh_proj = nn.Linear(2 * s.hidden, s.hidden, bias=False)
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.self_attn = MLA(s)
        self.transformer_layer = nn.ModuleDict({"mlp": MLP(s.hidden, s.dense)})

    def forward(
        self, words: Tensor, states: Tensor, rows: tuple[Tensor, Tensor], before: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        x = self.eh_proj(torch.cat((self.enorm["m"](words), self.hnorm["m"](states)), -1)).float()
        x = x + self.self_attn(self.input_layernorm(x), rows, before)
        return x + self.transformer_layer["mlp"](self.post_attention_layernorm(x))


class MTP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MTPLayer(s)])
        self.norm = RMSNorm(s.hidden, s.eps)


class Ngram(nn.Module):
    """Rows of tables chosen by hashes of the last 2 … N tokens, projected and averaged with the word's own."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        tables = (s.ngram_neighbors - 1) * s.ngram_splits
        width = s.hidden // tables
        self.sizes = [int(s.ngram_ratio * s.vocab) + 2 * i + 1 for i in range(tables)]
        self.embedders = nn.ModuleList(nn.Embedding(size, width) for size in self.sizes)
        self.post_projs = nn.ModuleList(nn.Linear(width, s.hidden, bias=False) for _ in range(tables))

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        s = self.s
        before = [tokens]
        open_ = torch.ones_like(tokens, dtype=torch.bool)
        for back in range(1, s.ngram_neighbors):
            token = F.pad(tokens, (back, 0), value=s.eos)[:, : tokens.shape[1]]
            open_ = open_ & (token != s.eos)  # also before the first token
            before.append(token.where(open_, 0))
        total = words
        for i, size in enumerate(self.sizes):
            n = 2 + i // s.ngram_splits
            ids = sum(before[back] * pow(s.vocab, back, size) for back in range(n)) % size
            total = total + self.post_projs[i](self.embedders[i](ids))
        return total / (1 + len(self.sizes))


class Longcat(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.ngram_embeddings = Ngram(s) if s.ngram_ratio else None
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)
        self.mtp = MTP(s)
        self.drop = nn.Dropout(s.dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                inner = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
                std = 0.02 if "embed" in name else parameter.shape[-1] ** -0.5 * (0.5 if inner else 1.0)
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 → hidden states after the final norm, [B, T, hidden] float32."""
        rows = rotary(tokens.shape[1], self.s.rope, self.s.theta, tokens.device)
        words = self.embed_tokens(tokens)
        x = self.drop(self.ngram_embeddings(tokens, words) if self.ngram_embeddings is not None else words).float()
        for layer in self.layers:
            x = layer(x, rows)
        return self.norm(x)

    def drafts(self, tokens: Tensor, hidden: Tensor, depths: int) -> list[Tensor]:
        """What the MTP layer makes of the rows at each depth, [B, T, hidden] each; it predicts what `hidden` predicts."""
        rows = rotary(tokens.shape[1], self.s.rope, self.s.theta, tokens.device)
        words = self.embed_tokens(tokens)
        before: list[tuple[Tensor, Tensor]] = []
        states = [hidden]
        for _ in range(depths):
            states.append(self.mtp.norm(self.mtp.layers[0](words, back_by_one(states[-1]), rows, before)))
        return states[1:]

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def routers(self) -> list[Router]:
        return [layer.mlp.router for layer in self.layers]


def turn(x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., T, size]: rotate pairs of neighbours."""
    cos, sin = rows
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
