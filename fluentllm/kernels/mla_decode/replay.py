"""The FP8 decode replayed in torch, piece by piece and page by page, as the plan and the kernel order it.

Slow, and exact about order: what the kernel may be compared with up to the rounding of FP16 probabilities, and what the combine
is tested on without a GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .layout import LATENT, PAGE, Fp8Planes
from .reference import gather_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .plan import DecodePlan


class Piece(NamedTuple):
    """Pages [first, last) of a sequence, read by one part."""

    part: int
    sequence: int
    first: int
    last: int

    @property
    def slot(self) -> int:
        """Where its partial result goes: a sequence's piece in its first part is slot 2p + 1, in a later part 2p."""
        return 2 * self.part + (self.first == 0)


def pieces(plan: DecodePlan) -> Iterator[Piece]:
    """All pieces, in the order in which each part takes them."""
    lengths, starts = plan.lengths.tolist(), plan.starts.tolist()
    for part, (begin, end, high, first, last, *_) in enumerate(plan.records.tolist()):
        bounds = (first, last)
        for sequence in range(begin, end):
            if bounds[0] < bounds[1]:
                yield Piece(part, sequence, *bounds)
            following = min(sequence + 1, end - 1)
            bounds = (0, min(-(-lengths[following] // PAGE), high - starts[following]))


def decode_pieces(
    plan: DecodePlan,
    q_latent: Tensor,
    q_rope: Tensor,
    q_scale: Tensor,
    cache: Fp8Planes,
    page_table: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised queries [N, q, H, 512], [N, q, H, 64], [N, q, H] → out [N, q · H, 512] float32 (NaN where the combine has to
    write), partial [2 · parts, q · H, 512] and lse [2 · parts, q · H] in log2 units (NaN where there is no piece)."""
    count, queries, heads, _ = q_latent.shape
    rows = queries * heads
    out = torch.full((count, rows, LATENT), math.nan, device=q_latent.device)
    partial = torch.full((2 * plan.parts, rows, LATENT), math.nan, device=q_latent.device)
    lse = torch.full((2 * plan.parts, rows), math.nan, device=q_latent.device)
    for piece in pieces(plan):
        i = piece.sequence
        keys = int(plan.lengths[i])
        content = q_latent[i].reshape(rows, LATENT).float()
        rope = q_rope[i].reshape(rows, -1).float()
        factor = q_scale[i].reshape(rows, 1) * (scale * math.log2(math.e))
        visible = keys - queries + 1 + torch.arange(rows, device=out.device) // heads
        result, sums = _attend_pages(piece, content, rope, factor, visible, cache, page_table[i], keys)
        if piece.last - piece.first == -(-keys // PAGE):
            out[i] = result
        else:
            partial[piece.slot], lse[piece.slot] = result, sums
    return out, partial, lse


def _attend_pages(
    piece: Piece, q: Tensor, q_rope: Tensor, factor: Tensor, visible: Tensor, cache: Fp8Planes, table: Tensor, keys: int
) -> tuple[Tensor, Tensor]:
    top = torch.full((q.shape[0],), -1.0e30, device=q.device)
    total = torch.zeros_like(top)
    acc = torch.zeros(q.shape[0], LATENT, device=q.device)
    rows = gather_tokens(table, keys)
    for index in range(piece.first, piece.last):
        own = rows[index * PAGE : (index + 1) * PAGE]
        page, offset = own // PAGE, own % PAGE
        value = cache.latent.view(torch.uint8)[page, offset].view(torch.float8_e4m3fn).float()
        k_scale = cache.scale[page, offset]
        raw = q @ value.T + q_rope @ cache.rope[page, offset].float().T
        weighted = raw * k_scale * factor + k_scale.log2()
        position = index * PAGE + torch.arange(own.shape[0], device=q.device)
        weighted = weighted.masked_fill(position[None, :] >= visible[:, None], -math.inf)
        new_top = torch.maximum(top, weighted.amax(1))
        alpha, prob = torch.exp2(top - new_top), torch.exp2(weighted - new_top[:, None])
        total = total * alpha + (prob / k_scale).sum(1)
        acc = acc * alpha[:, None] + prob.half().float() @ value
        top = new_top
    return acc / total.where(total > 0, 1.0)[:, None], (top + total.log2()).where(total > 0, -math.inf)


def combine_reference(plan: DecodePlan, out: Tensor, partial: Tensor, lse: Tensor) -> None:
    """Fill in what several parts share, and zeros for inert sequences: `combine_splits` in torch."""
    for i, (first, last) in enumerate(plan.spans.tolist()):
        if last < first:
            out[i] = 0
        elif last > first:
            slots = torch.tensor([2 * part + (part == first) for part in range(first, last + 1)], device=out.device)
            weights = torch.softmax(lse[slots].float() * math.log(2), 0).nan_to_num(0.0)
            out[i] = (weights[..., None] * partial[slots]).sum(0)
