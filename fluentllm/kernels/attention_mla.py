"""Multi-head latent attention in torch, in both forms: the absorbed one for few rows, the expanded one for many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def mla_absorbed(
    q_nope: Tensor, q_rope: Tensor, known: Tensor, up_k: Tensor, up_v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Queries taken to the latent space: q' = q_nope · up_k, scores = (q', q_rope) · (latent, k_rope), output = up_v · (weights
    · latent). known [N, L, C + rope], mask [N, 1, q, L] → [N · q, H, Dv]."""
    rows, heads, _ = q_nope.shape
    sequences, keys, _ = known.shape
    width = up_k.shape[2]
    absorbed = torch.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1)
    queries = torch.cat((absorbed, q_rope), -1).view(sequences, -1, known.shape[2])
    scores = torch.bmm(queries, known.transpose(1, 2)).view(sequences, -1, heads, keys).mul_(scale)
    weights = torch.softmax(scores + mask.transpose(1, 2), -1, dtype=torch.float32).to(q_nope.dtype)
    summed = torch.bmm(weights.view(sequences, -1, keys), known[..., :width]).view(rows, heads, width)
    return torch.bmm(summed.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)


def mla_expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Keys and values of each head made from the latent: q_nope [T, H, nope], latent [L, C], k_rope [L, rope], mask [1, 1, T,
    L] bool or None for plain causal → [T, H, Dv]."""
    heads = q_nope.shape[1]
    keys = torch.matmul(latent, up_k.transpose(1, 2))
    keys = torch.cat((keys, k_rope.expand(heads, -1, -1)), -1)
    values = torch.matmul(latent, up_v.transpose(1, 2))
    out = F.scaled_dot_product_attention(
        torch.cat((q_nope, q_rope), -1).transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)


def expanded_keys_and_values(known: Tensor, up_k: Tensor, up_v: Tensor) -> tuple[Tensor, Tensor]:
    """Pages of latents multiplied out to heads: known [P, page, C + rope], up_k [H, nope, C], up_v [H, Dv, C] → keys
    [P, page, H, nope + rope], values [P, page, H, Dv]."""
    heads, nope, width = up_k.shape
    latent, rope = known.split((width, known.shape[-1] - width), -1)
    keys = known.new_empty(*known.shape[:2], heads, nope + rope.shape[-1])
    keys[..., :nope] = (latent @ up_k.flatten(0, 1).T).unflatten(-1, (heads, nope))
    keys[..., nope:] = rope.unsqueeze(2)
    values = (latent @ up_v.flatten(0, 1).T).unflatten(-1, (heads, up_v.shape[1]))
    return keys, values
