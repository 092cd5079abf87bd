"""The whole router in one launch, for few tokens: the product, one program an expert and token, and then the choice, by the
last of a token's programs to finish."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .moe_route import choice_of, choose

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe import Routing

MOST_TOKENS = 16
"""Above this the product shares an expert's row among several tokens, and the choice has a launch of its own."""


@triton.jit
def _router_kernel(weights, ids, logits, counters, x, w, bias, x_row, w_row, scale, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr,
                   TOTAL: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
                   SIGMOID: tl.constexpr, TOP2: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_H)
    start_next(PDL, FIRST)
    # The router's weights are nobody's output: they may be read early.
    row = tl.load(w + expert.to(tl.int64) * w_row + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    a = tl.load(x + token * x_row + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
    start_next(PDL, LOADED)
    tl.store(logits + token * TOTAL + expert, tl.sum(a * row, 0))
    # The logit is written before the one that counts says so.
    tl.debug_barrier()
    if tl.atomic_add(counters + token, 1, sem="acq_rel") == TOTAL - 1:
        tl.store(counters + token, 0)
        e = tl.arange(0, BLOCK)
        found = tl.load(logits + token * TOTAL + e, mask=e < TOTAL, other=float("-inf"), cache_modifier=".cg")
        choose(weights, ids, found, bias, token, scale, TOTAL, TOP_K, GROUPS, TOP_GROUPS, SIGMOID, TOP2, RENORMALISE, BLOCK,
               BLOCK_K, BLOCK_G)  # fmt: skip


def new_router_counters(device: torch.device) -> Tensor:
    """For the router of one layer: zeros between calls. Calls that may run at the same time must not share it."""
    return torch.zeros(MOST_TOKENS, dtype=torch.int32, device=device)


def router(x: Tensor, weight: Tensor, counters: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, hidden], T at most `MOST_TOKENS`, weight [total, hidden] float32, bias [total] float32 → weights [T, top_k]
    float32, ids [T, top_k] int32, as `moe_route.route` of `moe_scores.router_logits` gives them."""
    (tokens, hidden), total, device = x.shape, weight.shape[0], x.device
    logits = torch.empty(tokens, total, dtype=torch.float32, device=device)
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=device)
    ids = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=device)
    launch(
        _router_kernel, (total, tokens), weights, ids, logits, counters, x, weight, bias, x.stride(0), weight.stride(0),
        routing.scale, HIDDEN=hidden, BLOCK_H=power_of_2(hidden), **choice_of(routing), num_warps=4, **programmatic(device),
    )  # fmt: skip
    return weights, ids
