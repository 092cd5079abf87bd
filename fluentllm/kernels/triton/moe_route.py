"""The router after its product: scores, choice and weights of a token's experts, one program a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe import LiveRows, Routing


@triton.jit
def _route_kernel(weights, ids, logits, bias, kv_rows, picked, row_stride, scale, page_size, TOTAL: tl.constexpr,
                  TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr,
                  TOP2: tl.constexpr, RENORMALISE: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside = e < TOTAL
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    x = tl.load(logits + token * row_stride + e, mask=inside, other=float("-inf")).to(tl.float32)
    if kv_rows is not None:
        row = token
        if picked is not None:
            row = tl.load(picked + token)
        live = tl.load(kv_rows + row) >= page_size
    start_next(PDL, LOADED)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        powers = tl.exp(x - tl.max(x, 0))
        scores = powers / tl.sum(powers, 0)
    choice = scores
    if bias is not None:
        choice = scores + tl.load(bias + e, mask=inside, other=0.0)
    # An id must be an expert's whatever the logits are: NaN is taken for the worst.
    choice = tl.where(inside & (choice == choice), choice, float("-inf"))  # noqa: PLR0124
    if GROUPS > 1:
        group = e // (TOTAL // GROUPS)
        g = tl.arange(0, BLOCK_G)
        group_scores = tl.full([BLOCK_G], float("-inf"), tl.float32)
        for i in tl.static_range(GROUPS):
            members = tl.where(group == i, choice, float("-inf"))
            best = tl.max(members, 0)
            if TOP2:
                first = tl.argmax(members, 0, tie_break_left=True)
                best = best + tl.max(tl.where(e == first, float("-inf"), members), 0)
            group_scores = tl.where(g == i, best, group_scores)
        kept = tl.zeros([BLOCK], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best_group = tl.argmax(group_scores, 0, tie_break_left=True)
            kept = tl.where(group == best_group, 1, kept)
            group_scores = tl.where(g == best_group, float("-inf"), group_scores)
        choice = tl.where(kept > 0, choice, float("-inf"))
    k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(TOP_K):
        expert = tl.argmax(choice, 0, tie_break_left=True)
        weight = tl.where(k == i, tl.sum(tl.where(e == expert, scores, 0.0), 0), weight)
        chosen = tl.where(k == i, expert, chosen)
        choice = tl.where(e == expert, float("-inf"), choice)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    weight = weight * scale
    if SHARED > 0:
        weight = tl.where(k < TOP_K, weight, 1.0)
        chosen = tl.where(k < TOP_K, chosen, TOTAL + k - TOP_K)
    if kv_rows is not None:
        weight = tl.where(live, weight, 0.0)
        chosen = tl.where(live, chosen, TOTAL + SHARED)
    each: tl.constexpr = TOP_K + SHARED
    tl.store(weights + token * each + k, weight, mask=k < each)
    tl.store(ids + token * each + k, chosen, mask=k < each)


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None, live: LiveRows | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, total] float32, bias [total] float32 → weights [T, each] float32, ids [T, each] int32, best first, of equals
    the lowest id; shared experts last. Tokens that are not `live` choose `routing.nothing`. Reference: `kernels.moe.route`."""
    tokens, total = logits.shape
    kv_rows, picked, page_size = (live.kv_rows, live.picked, live.page_size) if live is not None else (None, None, 0)
    weights = torch.empty(tokens, routing.each, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, routing.each, dtype=torch.int32, device=logits.device)
    block = power_of_2(total)
    launch(
        _route_kernel, (tokens,), weights, ids, logits, bias, kv_rows, picked, logits.stride(0), routing.scale, page_size,
        TOTAL=total, TOP_K=routing.top_k, GROUPS=routing.groups, TOP_GROUPS=routing.top_groups,
        SIGMOID=routing.scores == "sigmoid", TOP2=routing.group_score == "top2", RENORMALISE=routing.renormalise,
        SHARED=routing.shared, BLOCK=block, BLOCK_K=power_of_2(routing.each), BLOCK_G=power_of_2(routing.groups),
        num_warps=max(1, min(4, block // 128)), **programmatic(logits.device),
    )  # fmt: skip
    return weights, ids
