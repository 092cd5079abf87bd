"""Top-k, top-p and min-p without a sort: the least logit that may be drawn, a row, found by narrowing down its bits.

Float32 values are taken as integers of the same order; each pass over the row splits the interval that holds the threshold
into eight, so eleven passes find it exactly. A row stays in the second-level cache between passes, and rows without a filter
read nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launch import launch

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _ordered(x):
    """float32 → uint32 of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    negative = (bits >> 31) == 1
    return tl.where(negative, ~bits, bits | 0x80000000)


@triton.jit
def _from_ordered(key):
    positive = (key >> 31) == 1
    bits = tl.where(positive, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scaled(at, heat, token, vocab):
    x = tl.load(at + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, heat)


@triton.jit
def _search(at, heat, vocab, floor_key, highest, needed, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Largest key t with Σ weight(keys ≥ t) ≥ needed, over keys ≥ floor_key; weight is 1, or exp(x - highest)."""
    branch = tl.arange(0, 8)
    low = tl.zeros([1], tl.uint32)
    for step in range(11):
        # 32 bits: ten passes of three, one of two.
        shift = tl.maximum(29 - 3 * step, 0).to(tl.uint32)
        ways = tl.where(step < 10, 8, 4)
        candidate = low + (branch.to(tl.uint32) << shift)
        sums = tl.zeros([8], tl.float32)
        for base in range(0, vocab, BLOCK):
            token = base + tl.arange(0, BLOCK)
            x = _scaled(at, heat, token, vocab)
            key = _ordered(x)
            weight = tl.where((token < vocab) & (key >= floor_key), 1.0, 0.0)
            if BY_MASS:
                weight = weight * tl.exp(x - highest)
            sums += tl.sum(tl.where(key[:, None] >= candidate[None, :], weight[:, None], 0.0), 0)
        # The lowest candidate always holds enough, and sums fall as candidates rise.
        enough = (sums >= needed) & (branch < ways)
        best = tl.max(tl.where(enough, branch, 0), 0)
        low = low + (best.to(tl.uint32) << shift)
    # Nothing needed (a top_p of 0) would take the search past the largest number there is.
    return tl.minimum(low, _ordered(tl.zeros([1], tl.float32) + highest))


@triton.jit
def _threshold_kernel(thresholds, logits, slots, temperature, top_k, top_p, min_p, vocab, row_stride, float_stride, int_stride,
                      BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot * float_stride)
    k = tl.load(top_k + slot * int_stride)
    p = tl.load(top_p + slot * float_stride)
    least = tl.load(min_p + slot * float_stride)
    by_k = (k > 0) & (k < vocab)
    threshold = tl.full([1], float("-inf"), tl.float32)
    if (heat > 0) & (by_k | (p < 1) | (least > 0)):
        at = logits + row * row_stride
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for base in range(0, vocab, BLOCK):
            top = tl.maximum(top, _scaled(at, heat, base + tl.arange(0, BLOCK), vocab))
        highest = tl.max(top, 0)
        if by_k:
            key = _search(at, heat, vocab, tl.zeros([1], tl.uint32), highest, k.to(tl.float32), False, BLOCK)
            threshold = _from_ordered(key)
        if p < 1:
            floor_key = _ordered(threshold)
            mass = tl.zeros([BLOCK], tl.float32)
            for base in range(0, vocab, BLOCK):
                token = base + tl.arange(0, BLOCK)
                x = _scaled(at, heat, token, vocab)
                mass += tl.where((token < vocab) & (_ordered(x) >= floor_key), tl.exp(x - highest), 0.0)
            key = _search(at, heat, vocab, floor_key, highest, p * tl.sum(mass, 0), True, BLOCK)
            threshold = tl.maximum(threshold, _from_ordered(key))
        if least > 0:
            # prob ≥ least · (highest prob) in logits.
            threshold = tl.maximum(threshold, highest + tl.log(least))
        threshold = tl.minimum(threshold, highest)
    tl.store(thresholds + row + tl.arange(0, 1), threshold)


def filter_thresholds(
    logits: Tensor, slots: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """logits [R, V]; slots [R] int64; the rest columns of the slot tables (any stride; temperature, top_p and min_p share
    one), top_k int64 → thresholds [R] float32: of logits / temperature, what is ≥ the threshold stays; -inf where nothing is
    filtered.

    Order and meaning as `kernels.sampling.filter_logits`, the reference; the mass of top-p is summed in another order.
    """
    rows, vocab = logits.shape
    if not temperature.stride(0) == top_p.stride(0) == min_p.stride(0):
        raise ValueError("temperature, top_p and min_p must be columns of one table")
    thresholds = torch.empty(rows, dtype=torch.float32, device=logits.device)
    launch(
        _threshold_kernel, (rows,), thresholds, logits, slots, temperature, top_k, top_p, min_p, vocab, logits.stride(0),
        temperature.stride(0), top_k.stride(0), BLOCK=2048, num_warps=16,
    )  # fmt: skip
    return thresholds
