"""The router's product: every token's logit for every expert, in float32 whatever the activations are.

A program multiplies one expert's row with a few tokens: small as it is, the product is spread over the whole chip. Every
program sees whole rows of x, so it can finish their norm (`normed.Normed`), and the first expert's write it for the experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .normed import norm_factor, opened

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import Normed

MOST_TOKENS = 64
"""Above this `moe_scores_wide` takes over: here each program reads its tokens again."""


@triton.jit(do_not_specialize=["tokens", "parts"])
def _scores_kernel(logits, x, w, squares, x_out, tokens, x_row, w_row, total, parts, eps, HIDDEN: tl.constexpr,
                   BLOCK: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
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
            if PARTS > 0:
                part = tl.arange(0, PARTS)
                found = tl.load(squares + part.to(tl.int64) * tokens + token, mask=part < parts, other=0.0)
                # Rounded as a norm of its own would leave it.
                finished = (a * norm_factor(found, HIDDEN, eps)).to(x.dtype.element_ty)
                a = finished.to(tl.float32)
                if expert == 0:
                    tl.store(x_out + token.to(tl.int64) * HIDDEN + i, finished, mask=i < HIDDEN)
            tl.store(logits + token.to(tl.int64) * total + expert, tl.sum(a * row, 0))


def router_logits(x: Tensor, weight: Tensor, *, each: int | None = None) -> Tensor:
    """x [T, hidden], weight [total, hidden] float32 → [T, total] float32; `each`: tokens of a program, else by T. Reference:
    `F.linear` of x in float32."""
    return _scores(x, weight, each)[0]


def normed_router_logits(x: Normed, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `router_logits` of x.tensor(), and that, [T, hidden]."""
    logits, rows = _scores(x, weight, None)
    assert rows is not None
    return logits, rows


def _scores(x: Tensor | Normed, weight: Tensor, each: int | None) -> tuple[Tensor, Tensor | None]:
    x, squares, parts, eps = opened(x)
    (tokens, hidden), total = x.shape, weight.shape[0]
    rows = None if squares is None else torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    logits = torch.empty(tokens, total, dtype=torch.float32, device=x.device)
    each = each or (1 if tokens <= 4 else 4)
    launch(
        _scores_kernel, (total, -(-tokens // each)), logits, x, weight, squares, rows, tokens, x.stride(0),
        weight.stride(0), total, parts, eps, HIDDEN=hidden, BLOCK=power_of_2(hidden), TOKENS=each,
        PARTS=power_of_2(parts) if parts else 0, num_warps=4, **programmatic(x.device),
    )  # fmt: skip
    return logits, rows
