"""Drawing a token a row: temperature, filter, Gumbel noise and argmax in one pass over the logits.

The vocabulary is cut into slices, one program each, and a second kernel takes the best of them. Ties go to the lowest id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launch import launch, power_of_2

if TYPE_CHECKING:
    from torch import Tensor

SLICE = 4096
"""Tokens of the vocabulary a program reads."""


@triton.jit
def _mix(h):
    """MurmurHash3's 32-bit finaliser; h uint32. The same integers as `kernels.sampling`."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _noise(seed, position, tokens):
    """seed, position int64 scalars, tokens int32 [n] → float32 [n]; `kernels.sampling.gumbel_noise` explains."""
    golden = tl.full([1], 0x9E3779B9, tl.uint32)
    low = tl.full([1], 0, tl.uint32) + seed.to(tl.uint32)
    high = tl.full([1], 0, tl.uint32) + (seed >> 32).to(tl.uint32)
    at = tl.full([1], 0, tl.uint32) + position.to(tl.uint32)
    key = _mix(low ^ _mix(at * golden + 1)) ^ _mix(high + golden)
    h = (tokens.to(tl.uint32) * golden) ^ key
    h = _mix(_mix(h) + key)
    uniform = ((h >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _draw_kernel(best_value, best_token, logits, slots, positions, temperature, seeds, thresholds, vocab, row_stride,
                 slot_stride, seed_stride, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    x = tl.load(logits + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    if slots is not None:
        slot = tl.load(slots + row)
        heat = tl.load(temperature + slot * slot_stride)
        if heat > 0:
            x = tl.div_rn(x, heat)
            if thresholds is not None:
                x = tl.where(x >= tl.load(thresholds + row), x, float("-inf"))
            x = x + _noise(tl.load(seeds + slot * seed_stride), tl.load(positions + row), token)
    # A NaN would poison every comparison; as the lowest value it can only lose.
    x = tl.where((x == x) & inside, x, float("-inf"))  # noqa: PLR0124
    value, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(1) + part
    tl.store(best_value + out, value)
    tl.store(best_token + out, part * BLOCK + index)


@triton.jit
def _best_kernel(drawn, best_value, best_token, parts, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(best_value + row * parts + i, mask=i < parts, other=float("-inf"))
    best = tl.argmax(value, 0, tie_break_left=True)
    tl.store(drawn + row, tl.load(best_token + row * parts + best).to(tl.int64))


def argmax(logits: Tensor) -> Tensor:
    """logits [R, V], float32 or a half → [R] int64, the lowest id of the largest. Reference: `torch.argmax`."""
    return _draw(logits, None, None, None, None, None)


def draw(
    logits: Tensor, slots: Tensor, positions: Tensor, temperature: Tensor, seeds: Tensor, thresholds: Tensor | None = None
) -> Tensor:
    """argmax(logits / T + noise(seed, position)) a row, argmax(logits) where T is 0 → [R] int64.

    logits [R, V]; slots, positions [R] int64; temperature float32, seeds int64: columns of the slot tables (any stride),
    indexed by slot; thresholds [R] float32 of `filter.filter_thresholds`: what is below, after the temperature, is left out.
    Reference: `step.sample.draw`, whose noise has the same integers; logarithms may differ in their last bits.
    """
    return _draw(logits, slots, positions, temperature, seeds, thresholds)


def _draw(
    logits: Tensor,
    slots: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None,
    seeds: Tensor | None,
    thresholds: Tensor | None,
) -> Tensor:
    rows, vocab = logits.shape
    block = min(SLICE, power_of_2(vocab))
    parts = -(-vocab // block)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        _draw_kernel, (rows, parts), values, tokens, logits, slots, positions, temperature, seeds, thresholds, vocab,
        logits.stride(0), 0 if temperature is None else temperature.stride(0), 0 if seeds is None else seeds.stride(0),
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    launch(_best_kernel, (rows,), drawn, values, tokens, parts, BLOCK=power_of_2(parts), num_warps=1)
    return drawn
