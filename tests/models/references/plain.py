"""What Transformers lacks, written as plainly as possible from the formulas: n-gram embedding and MTP layers.

Whole sequences at once, no cache, float32, Python integers for hashes. `state` is a checkpoint's tensors by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


# ------------------------------------------------------------------------------------------------------- n-gram embedding
def ngram_ids(
    tokens: Sequence[int], vocab: int, ratio: float, neighbors: int, splits: int, eos: Sequence[int]
) -> list[list[int]]:
    """For each position, its row in each of the (neighbors - 1) · splits tables."""
    rows = []
    for t in range(len(tokens)):
        row = []
        for n in range(2, neighbors + 1):
            for k in range(splits):
                modulus = int(ratio * vocab) + 2 * ((n - 2) * splits + k) + 1
                total = tokens[t]
                for back in range(1, n):
                    if t - back < 0 or tokens[t - back] in eos:
                        break
                    total += tokens[t - back] * (vocab**back % modulus)
                row.append(total % modulus)
        rows.append(row)
    return rows


def ngram_embedding(
    state: State, tokens: Sequence[int], vocab: int, ratio: float, neighbors: int, splits: int, eos: Sequence[int]
) -> Tensor:
    """[T, hidden]: the mean of the word embedding and all projected table rows."""
    out = []
    for token, row in zip(tokens, ngram_ids(tokens, vocab, ratio, neighbors, splits, eos), strict=True):
        parts = [state["model.embed_tokens.weight"][token]]
        for i, number in enumerate(row):
            projection = state[f"model.ngram_embeddings.post_projs.{i}.weight"]
            parts.append(projection @ state[f"model.ngram_embeddings.embedders.{i}.weight"][number])
        out.append(sum(parts) / len(parts))
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------------------- MTP layers
@dataclass(frozen=True)
class MLAShape:
    heads: int
    nope: int
    rope: int
    value: int
    frequencies: Tensor
    """[rope / 2], radians a position."""
    rotary_scale: float
    """Multiplies cosine and sine (yarn)."""
    softmax_scale: float
    query_scale: float = 1.0
    latent_scale: float = 1.0


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def swiglu(state: State, prefix: str, x: Tensor) -> Tensor:
    gate, up = x @ state[f"{prefix}.gate_proj.weight"].T, x @ state[f"{prefix}.up_proj.weight"].T
    return (F.silu(gate) * up) @ state[f"{prefix}.down_proj.weight"].T


def rotate(x: Tensor, shape: MLAShape) -> Tensor:
    """x [T, ..., rope], interleaved pairs, row t at position t."""
    for t in range(x.shape[0]):
        pairs = torch.view_as_complex(x[t].double().unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(
            torch.full_like(shape.frequencies, shape.rotary_scale).double(), t * shape.frequencies.double()
        )
        x[t] = torch.view_as_real(turned).flatten(-2).float()
    return x


def mla(state: State, prefix: str, x: Tensor, shape: MLAShape, eps: float = 1e-6) -> Tensor:
    """Expanded attention of a whole sequence. x [T, hidden], normed."""
    length = x.shape[0]
    latent_dim = state[f"{prefix}.kv_a_layernorm.weight"].shape[0]
    q = rms(x @ state[f"{prefix}.q_a_proj.weight"].T, state[f"{prefix}.q_a_layernorm.weight"], eps) * shape.query_scale
    q = (q @ state[f"{prefix}.q_b_proj.weight"].T).view(length, shape.heads, shape.nope + shape.rope)
    latent, k_rope = (x @ state[f"{prefix}.kv_a_proj_with_mqa.weight"].T).split([latent_dim, shape.rope], -1)
    latent = rms(latent, state[f"{prefix}.kv_a_layernorm.weight"], eps) * shape.latent_scale
    kv = (latent @ state[f"{prefix}.kv_b_proj.weight"].T).view(length, shape.heads, shape.nope + shape.value)
    q_rope, k_rope = rotate(q[..., shape.nope :].clone(), shape), rotate(k_rope.clone(), shape)
    scores = torch.einsum("thd,shd->hts", q[..., : shape.nope], kv[..., : shape.nope])
    scores = (scores + torch.einsum("thd,sd->hts", q_rope, k_rope)) * shape.softmax_scale
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), kv[..., shape.nope :])
    return out.flatten(1) @ state[f"{prefix}.o_proj.weight"].T


def deepseek_moe(state: State, prefix: str, x: Tensor, top_k: int, groups: int, top_groups: int, scale: float) -> Tensor:
    """V3: sigmoid scores, bias for selection, group-limited, renormalised, shared experts."""
    out = swiglu(state, f"{prefix}.shared_experts", x)
    for t, row in enumerate(x):
        scores = torch.sigmoid(state[f"{prefix}.gate.weight"] @ row)
        choice = scores + state[f"{prefix}.gate.e_score_correction_bias"]
        grouped = choice.view(groups, -1)
        best = sorted(range(groups), key=lambda g: -grouped[g].topk(2).values.sum().item())[:top_groups]
        size = grouped.shape[1]
        allowed = [e for e in range(len(scores)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -choice[e].item())[:top_k]
        total = sum(scores[e] for e in chosen)
        for e in chosen:
            out[t] += scale * scores[e] / total * swiglu(state, f"{prefix}.experts.{e}", row)
    return out


def mtp_input(state: State, names: Mapping[str, str], tokens: Sequence[int], hidden: Tensor, eps: float) -> Tensor:
    """eh_proj([enorm(embed(token)); hnorm(previous hidden)]); position 0 has no previous hidden state: zeros."""
    previous = torch.cat([torch.zeros(1, hidden.shape[1]), hidden[:-1]])
    embedded = rms(state[names["embed"]][torch.tensor(tokens)], state[names["enorm"]], eps)
    return torch.cat([embedded, rms(previous, state[names["hnorm"]], eps)], -1) @ state[names["eh_proj"]].T


def longcat_mtp(state: State, tokens: Sequence[int], hidden: Tensor, shape: MLAShape, eps: float) -> Tensor:
    """hidden [T, hidden] of the target after its final norm → the MTP layer's output after `mtp.norm`, [T, hidden]: row t
    has seen the pairs (hidden of t' - 1, token t') for t' ≤ t."""
    layer = "model.mtp.layers.0"
    names = {
        "embed": "model.mtp.embed_tokens.weight",
        "enorm": f"{layer}.enorm.m.weight",
        "hnorm": f"{layer}.hnorm.m.weight",
        "eh_proj": f"{layer}.eh_proj.weight",
    }
    x = mtp_input(state, names, tokens, hidden, eps)
    x = x + mla(state, f"{layer}.self_attn", rms(x, state[f"{layer}.input_layernorm.weight"], eps), shape)
    x = x + swiglu(state, f"{layer}.transformer_layer.mlp", rms(x, state[f"{layer}.post_attention_layernorm.weight"], eps))
    return rms(x, state["model.mtp.norm.weight"], eps)


def deepseek_mtp(
    state: State, layer: str, tokens: Sequence[int], hidden: Tensor, shape: MLAShape, eps: float, moe: Mapping[str, float]
) -> Tensor:
    """The same for DeepSeek-V3: an MoE layer at `model.layers.{num_hidden_layers}`, its norm in `shared_head.norm`."""
    names = {
        "embed": f"{layer}.embed_tokens.weight",
        "enorm": f"{layer}.enorm.weight",
        "hnorm": f"{layer}.hnorm.weight",
        "eh_proj": f"{layer}.eh_proj.weight",
    }
    x = mtp_input(state, names, tokens, hidden, eps)
    x = x + mla(state, f"{layer}.self_attn", rms(x, state[f"{layer}.input_layernorm.weight"], eps), shape)
    x = x + deepseek_moe(state, f"{layer}.mlp", rms(x, state[f"{layer}.post_attention_layernorm.weight"], eps), **moe)
    return rms(x, state[f"{layer}.shared_head.norm.weight"], eps)
