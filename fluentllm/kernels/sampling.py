"""Noise and filters of sampling, over [R, V] float32 logits: the torch forms that run on every device.

Nothing here synchronises with the host or sorts, so all of it can stand inside a captured step. The plain forms, which
sort, are beside the fast ones for the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FMIX_1 = -2048144789  # 0x85EBCA6B as int32
_FMIX_2 = -1028477387  # 0xC2B2AE35 as int32
_GOLDEN = -1640531527  # 0x9E3779B9 as int32


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain), a bijection of int32, in place."""
    h ^= (h >> 16) & 0xFFFF
    h *= _FMIX_1
    h ^= (h >> 13) & 0x7FFFF
    h *= _FMIX_2
    h ^= (h >> 16) & 0xFFFF
    return h


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [R, V] float32, a pure function of (seed, position, token).

    seeds, positions: [R] int64. argmax(logits + noise) is a draw from softmax(logits) (the Gumbel-max trick), and because
    the noise depends on nothing else, the draw does not depend on batch, step or speculation.
    """
    low = seeds.to(torch.int32)
    high = (seeds >> 32).to(torch.int32)
    key = _mix(low ^ _mix(positions.to(torch.int32) * _GOLDEN + 1)) ^ _mix(high + _GOLDEN)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    h = (tokens * _GOLDEN).unsqueeze(0) ^ key.unsqueeze(1)
    h = _mix(_mix(h) + key.unsqueeze(1))
    # 23 bits, centred: exact in float32, so never 0 and never 1 (with 24, the largest would round to 1: infinite noise).
    uniform = ((h >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _ordered(x: Tensor) -> Tensor:
    """float32 → int32 with the same order."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest_threshold(keys: Tensor, weights: Tensor | None, needed: Tensor) -> Tensor:
    """Largest t, as [R, 1] int32, with Σ weights[keys ≥ t] ≥ needed (weights 1 where None), by bisection on the bits.

    Exact, without a sort: 32 passes over [R, V].
    """
    low = torch.full_like(needed, -(2**31), dtype=torch.int64)
    high = torch.full_like(needed, 2**31, dtype=torch.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        kept = keys >= middle.to(torch.int32)
        total = kept.sum(1, keepdim=True) if weights is None else torch.where(kept, weights, 0.0).sum(1, keepdim=True)
        enough = total >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low.to(torch.int32)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what top-k, top-p and min-p exclude; [R, V] float32 in, a new tensor out.

    top_k [R] int64 (0: off), top_p, min_p [R] float32. In this order: the top_k most likely; of these, renormalised, the
    smallest set of most likely tokens that holds top_p; and of the whole, what is at least min_p × the most likely.
    Tokens that tie with the last one kept are kept.
    """
    vocab = logits.shape[1]
    keys = _ordered(logits)
    wanted = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).unsqueeze(1)
    kept = keys >= _largest_threshold(keys, None, wanted)
    probs = torch.softmax(logits.masked_fill(~kept, float("-inf")), dim=1)
    nucleus = keys >= _largest_threshold(keys, probs, top_p.unsqueeze(1))
    # What rounding leaves short of 1 must not exclude anything when top_p is 1.
    kept &= nucleus | (top_p >= 1).unsqueeze(1)
    kept &= probs >= min_p.unsqueeze(1) * probs.amax(1, keepdim=True)
    # The most likely token always stays, whatever the parameters.
    kept |= logits == logits.amax(1, keepdim=True)
    return logits.masked_fill(~kept, float("-inf"))


def filter_logits_reference(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The same by sorting each row: the plain form."""
    out = torch.full_like(logits, float("-inf"))
    for row in range(logits.shape[0]):
        x = logits[row]
        values, _ = x.sort(descending=True)
        k = int(top_k[row]) or x.numel()
        threshold = values[min(k, x.numel()) - 1]
        inside = values[values >= threshold]
        probs = torch.softmax(inside, 0)
        if float(top_p[row]) < 1:
            needed = int((probs.cumsum(0) < top_p[row]).sum())
            threshold = inside[min(needed, inside.numel() - 1)]
        floor = probs[0] * min_p[row]
        keep = (x >= threshold) & (torch.exp(x - values[0]) * probs[0] >= floor)
        keep |= x == values[0]
        out[row, keep] = x[keep]
    return out
