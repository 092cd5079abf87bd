"""The router's product of many tokens: `moe_scores` on tensor cores, as accurate as in float32.

Tensor cores multiply BF16, which x is already. A float32 weight is the sum of three BF16 numbers of 8 bits each, and products
of BF16 numbers are exact in float32, so three products give what one in float32 would. Tensor cores cut sums off instead of
rounding them, always towards zero: what they add up stays short, a step of the depth, and steps are added in float32.

The weights, split in registers, are the M of the matrix instruction. There are few tiles, so several programs share a tile's
depth, and the last to finish adds up what all found, in their order, as in `linear.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..weights import DenseWeight
from .language import FIRST, LOADED, dot, prefetch_l2, start_next, wait_for_inputs
from .launch import bulk_copies, launch, multiprocessors, programmatic

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS: tl.constexpr = tl.constexpr(64)
"""Of a tile: the matrix instruction's M."""
MOST_SPLIT_TILES = 128
"""Tiles whose programs are counted; more of them fill any chip without splitting."""


@dataclass(frozen=True, slots=True)
class WideTile:
    tokens: int
    """Of a tile, a multiple of 16."""
    splits: int
    """Programs that share a tile's depth."""
    depth: int
    """Of a step."""
    stages: int
    """Steps under way."""


@triton.jit
def _split(a):
    """a, float32 → its first 8 bits as BF16, and the rest, float32."""
    bits = a.to(tl.int32, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return high, a - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _wide_scores_kernel(logits, x, w, partial, counters, tokens, total, steps, x_row, w_row, HIDDEN: tl.constexpr,
                        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
                        PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    columns = tl.cdiv(total, EXPERTS)
    expert = tile % columns * EXPERTS + tl.arange(0, EXPERTS)
    token = tile // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(HIDDEN, BLOCK_K))
    w_at = w + (expert.to(tl.int64) * w_row)[:, None]
    start_next(PDL, FIRST)
    if PREFETCH and PDL > 0:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
        # The router's weights are nobody's output: they may be asked for early. The first tokens' programs ask for all.
        if tile < columns:
            for step in range(first, last):
                at = step * BLOCK_K + tl.arange(0, 1)
                there = (expert < total)[:, None] & (at + BLOCK_K <= HIDDEN)[None, :]
                prefetch_l2(w_at + at[None, :], there, 4 * BLOCK_K)
    wait_for_inputs(PDL)
    x_at = x + (token.to(tl.int64) * x_row)[:, None] + k[None, :]
    acc = tl.zeros([EXPERTS, BLOCK_T], tl.float32)
    zero = tl.zeros([EXPERTS, BLOCK_T], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        base = step * BLOCK_K
        deep = (base + k < HIDDEN)[None, :]
        a = tl.load(w_at + k[None, :] + base, mask=(expert < total)[:, None] & deep, other=0.0)
        b = tl.trans(tl.load(x_at + base, mask=(token < tokens)[:, None] & deep, other=0.0))
        high, a = _split(a)
        middle, a = _split(a)
        found = dot(a.to(tl.bfloat16), b, zero)
        found = dot(middle, b, found)
        # Added to a product that began at zero this would be compiled to one long sum again.
        acc += dot(high, b, found)
    start_next(PDL, LOADED)
    out = logits + (token.to(tl.int64) * total)[None, :] + expert[:, None]
    inside = (token < tokens)[None, :] & (expert < total)[:, None]
    if SPLITS == 1:
        tl.store(out, acc, mask=inside)
    else:
        place = tl.arange(0, EXPERTS)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        sums = partial + tile.to(tl.int64) * (SPLITS * EXPERTS * BLOCK_T) + place
        tl.store(sums + split * (EXPERTS * BLOCK_T), acc)
        # All threads' sums are written before the one that counts says so.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros([EXPERTS, BLOCK_T], tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(sums + i * (EXPERTS * BLOCK_T), cache_modifier=".cg")
            tl.store(counters + tile, 0)
            tl.store(out, acc, mask=inside)


class RouterWeight(DenseWeight):
    """Float32, for `wide_router_logits`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.counters = new_counters(weight.device)

    def takes(self, x: Tensor) -> bool:
        """Rows [T, in] that `wide_router_logits` multiplies?"""
        return x.dtype is torch.bfloat16 and x.stride(-1) == 1 and self.weight.stride(-1) == 1


def new_counters(device: torch.device) -> Tensor:
    """What `wide_router_logits` counts finished programs in: zeros between calls. Calls that may run at the same time must not
    share it."""
    return torch.zeros(MOST_SPLIT_TILES, dtype=torch.int32, device=device)


def wide_router_logits(x: Tensor, weight: Tensor, *, counters: Tensor | None = None, tile: WideTile | None = None) -> Tensor:
    """x [T, hidden] BF16, weight [total, hidden] float32 → [T, total] float32; last dimensions contiguous. Without
    `counters` the depth is not split. Reference: `F.linear` of x in float32."""
    (tokens, hidden), total = x.shape, weight.shape[0]
    tile = tile or wide_tile(tokens, total, x.device)
    logits = torch.empty(tokens, total, dtype=torch.float32, device=x.device)
    tiles = -(-total // EXPERTS.value) * -(-tokens // tile.tokens)
    splits = tile.splits if counters is not None and tiles <= MOST_SPLIT_TILES else 1
    partial = None
    if splits > 1:
        partial = torch.empty(tiles * splits * EXPERTS.value * tile.tokens, dtype=torch.float32, device=x.device)
    launch(
        _wide_scores_kernel, (tiles * splits,), logits, x, weight, partial, counters if splits > 1 else None, tokens, total,
        -(-hidden // (tile.depth * splits)), x.stride(0), weight.stride(0),
        HIDDEN=hidden, BLOCK_T=tile.tokens, BLOCK_K=tile.depth, SPLITS=splits, STAGES=tile.stages, PREFETCH=bulk_copies(weight),
        num_warps=4, num_stages=tile.stages, **programmatic(x.device, "product"),
    )  # fmt: skip
    return logits


def wide_tile(tokens: int, total: int, device: torch.device) -> WideTile:
    """Narrow tiles until half of the chip has one: wider ones read the weights less often. Splits fill the chip twice. As
    benchmarks/kernels/router.py found best on an H100, 64 experts, 128 to 8,192 tokens."""
    places, columns = multiprocessors(device), -(-total // EXPERTS.value)
    width = 16
    while width < 64 and 2 * columns * -(-tokens // width) > places:
        width *= 2
    tiles = max(1, columns * -(-tokens // width))
    splits = 1
    while splits < 8 and splits * tiles <= places:
        splits *= 2
    return WideTile(width, splits, 64, {16: 8, 32: 5, 64: 4}[width])
