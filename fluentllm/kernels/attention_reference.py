"""Attention written out row by row and head by head: what every fast path is compared with. Works in float64 too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def gather_rows(pool: Tensor, pages: Tensor, length: int) -> Tensor:
    """pool [pages, page_size, ...], pages [P] of one sequence → its first `length` token rows [length, ...]."""
    return pool[pages.long()].flatten(0, 1)[:length]


def attend_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query row: q [H, D], k [L, Hkv, D], v [L, Hkv, Dv] → [H, Dv]. Head h reads key-value head h // (H / Hkv)."""
    heads, group = q.shape[0], q.shape[0] // k.shape[1]
    out = []
    for head in range(heads):
        keys, values = k[:, head // group], v[:, head // group]
        weights = torch.softmax((keys @ q[head]) * scale, dim=0)
        out.append(weights @ values)
    return torch.stack(out)


def gqa_reference(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Rows of one sequence: q [T, H, D] at `positions` [T]; k [L, Hkv, D], v [L, Hkv, Dv] from position 0 on → [T, H, Dv]."""
    rows = [attend_row(q[row], k[: position + 1], v[: position + 1], scale) for row, position in enumerate(positions.tolist())]
    return torch.stack(rows) if rows else q.new_zeros(0, q.shape[1], v.shape[2])


def mla_reference(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Rows of one sequence, expanded form: keys are (up_k latent, k_rope), values up_v latent.

    q_nope [T, H, nope], q_rope [T, H, rope]; latent [L, C], k_rope [L, rope]; up_k [H, nope, C], up_v [H, Dv, C] → [T, H, Dv].
    """
    heads = q_nope.shape[1]
    keys = torch.stack([latent @ up_k[head].T for head in range(heads)], dim=1)
    keys = torch.cat((keys, k_rope.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
    values = torch.stack([latent @ up_v[head].T for head in range(heads)], dim=1)
    return gqa_reference(torch.cat((q_nope, q_rope), dim=-1), keys, values, positions, scale)
