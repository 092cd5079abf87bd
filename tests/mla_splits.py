"""What an MLA decode that splits sequences leaves behind, at random; shared by the tests of who merges it."""

from __future__ import annotations

import torch
from torch import Tensor

from fluentllm.kernels.mla_decode.plan import DecodePlan
from fluentllm.kernels.mla_decode.replay import pieces


def decoded(plan: DecodePlan, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(out, partial, lse) as a decode leaves them for this plan, NaN wherever it writes nothing."""
    lengths = plan.lengths.tolist()
    out = torch.full((len(lengths), rows, 512), torch.nan)
    partial = torch.full((2 * plan.parts, rows, 512), torch.nan)
    lse = torch.full((2 * plan.parts, rows), torch.nan)
    for piece in pieces(plan):
        values = torch.randn(rows, 512, generator=rng)
        if piece.last - piece.first == -(-lengths[piece.sequence] // 64):
            out[piece.sequence] = values
        else:
            partial[piece.slot] = values
            lse[piece.slot] = torch.randn(rows, generator=rng) * 3
            # Some rows of a split see no key of it.
            blind = torch.rand(rows, generator=rng) < 0.1
            lse[piece.slot][blind], partial[piece.slot][blind] = -torch.inf, 0.0
    return out, partial, lse
