"""Attention in a fixed order (deterministic mode): a row's bits depend on its own query and keys alone.

Products are elementwise, sums halve or run from left to right over tiles of `KEYS` positions counted from position 0, so
neither batch, query length, chunk borders nor padding can change the order of additions. Float32 throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .fixed_order import in_pieces, ordered_row_sum

if TYPE_CHECKING:
    from torch import Tensor

KEYS = 64
"""Positions of one tile."""
_WORKSPACE = 1 << 23
"""Values of one elementwise product, which bounds how many rows are done at a time."""


def fixed_order_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, first_key: int = 0) -> Tensor:
    """Rows of one sequence: q [T, H, D] at `positions` [T]; k [L, Hkv, D], v [L, Hkv, Dv], L > positions → [T, H, Dv] in q's
    dtype. Keys before `first_key` < L are not seen; a row before it gets something finite."""
    rows, heads, dim = q.shape
    if not rows:
        return q.new_zeros(0, heads, v.shape[2])
    group = heads // k.shape[1]
    keys = _tiles(k).repeat_interleave(group, 0)
    values = _tiles(v).repeat_interleave(group, 0).transpose(-1, -2).contiguous()
    width = keys.shape[1] * KEYS * max(dim, v.shape[2])
    step = max(1, _WORKSPACE // (heads * width))
    blocks = [
        _attend(q_block.float() * scale, keys, values, block.clamp(min=first_key), first_key)
        for q_block, block in zip(q.split(step), positions.split(step), strict=True)
    ]
    return torch.cat(blocks).to(q.dtype)


def _tiles(x: Tensor) -> Tensor:
    """[L, Hkv, D] → [Hkv, tiles, KEYS, D] float32, filled up with zeros."""
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[0] % KEYS))
    return padded.transpose(0, 1).unflatten(1, (-1, KEYS))


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, first_key: int) -> Tensor:
    """q [R, H, D] float32, keys [H, tiles, KEYS, D], values [H, tiles, Dv, KEYS] → [R, H, Dv]."""
    tiles = keys.shape[1]
    scores = ordered_row_sum(q[:, :, None, None, :] * keys)
    index = torch.arange(tiles * KEYS, device=q.device).view(tiles, KEYS)
    scores = scores.masked_fill((index > positions[:, None, None, None]) | (index < first_key), float("-inf"))
    shifted = scores - scores.amax((2, 3), keepdim=True)
    weights = in_pieces(torch.exp, shifted)
    total = _left_to_right(ordered_row_sum(weights))
    summed = _left_to_right(ordered_row_sum(weights.unsqueeze(3) * values))
    return summed / total.unsqueeze(-1)


def _left_to_right(x: Tensor) -> Tensor:
    """[R, H, tiles, ...] → [R, H, ...]: tiles added one after the other; those past a row's end are zeros, which change
    nothing."""
    total = x[:, :, 0]
    for tile in range(1, x.shape[2]):
        total = total + x[:, :, tile]
    return total
