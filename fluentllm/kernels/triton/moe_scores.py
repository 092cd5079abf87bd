"""The router's product: every token's logit for every expert, in float32 whatever the activations are.

A program multiplies one expert's row with a few tokens: small as it is, the product is spread over the whole chip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 256
"""Above this a library's product is faster: each program reads its tokens again."""


@triton.jit
def _scores_kernel(logits, x, w, tokens, x_row, w_row, total, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
                   TOKENS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    start_next(PDL, FIRST)
    # The router's weights are nobody's output: they may be read early.
    row = tl.load(w + expert.to(tl.int64) * w_row + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    start_next(PDL, LOADED)
    for t in tl.static_range(TOKENS):
        token = tl.program_id(1) * TOKENS + t
        if token < tokens:
            a = tl.load(x + token.to(tl.int64) * x_row + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
            tl.store(logits + token.to(tl.int64) * total + expert, tl.sum(a * row, 0))


def router_logits(x: Tensor, weight: Tensor, *, each: int | None = None) -> Tensor:
    """x [T, hidden], weight [total, hidden] float32 → [T, total] float32; `each`: tokens of a program, else by T. Reference:
    `F.linear` of x in float32."""
    (tokens, hidden), total = x.shape, weight.shape[0]
    logits = torch.empty(tokens, total, dtype=torch.float32, device=x.device)
    each = each or (1 if tokens <= 4 else 4)
    launch(
        _scores_kernel, (total, -(-tokens // each)), logits, x, weight, tokens, x.stride(0), weight.stride(0), total,
        HIDDEN=hidden, BLOCK=power_of_2(hidden), TOKENS=each, num_warps=4, **programmatic(x.device),
    )  # fmt: skip
    return logits
