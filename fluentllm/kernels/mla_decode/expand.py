"""Behind the decode: a sequence's splits are merged and each head's latent is multiplied with its up_v, in one launch or two.

A program has a tile of a head's value rows for a tile of tokens, and needs their latents whole: merging in it repeats the merge
once a tile of value rows. Counted for 16 heads, 128 value rows in tiles of 32, an H100 (a multiprocessor takes about 70 bytes a
nanosecond from L2; a launch that is set up under the one in front costs about 1 µs):

- One token, s splits: a program reads 32 KB of weights and 2 KB · s. s = 16 (ctx 1,024): 0.9 µs, and a launch less than the
  combine and the product apart, which cost 1 µs more. s = 50: both are equal. s = 132: 4.3 µs against 1.9.
- 8 tokens of 16 splits each: one merge is 4 MB, four are 17 MB, 3 µs of L2 as a whole; the combine takes 1.
- 32 tokens of 4 splits: the same 4 MB.

So splits are merged here where a tile's tokens have few, and before, by `combine`, where they have many. Which of the two
holds is known on the device alone: both launches look at the plan and divide the sequences between them. Where even the most
splits that the page table allows are few, the combine is not launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..triton.language import FIRST, LOADED, dot, start_next, wait_for_inputs
from ..triton.launch import launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import DecodePlan

MERGE_INSIDE: bool | None = None
"""True: `merge_and_expand` merges all splits; False: `combine` does; None: by counting, as above."""
ALL = 0
"""Of `Shares.most`."""
WORTH_ALL, WORTH_SOME = 8, 8
"""Splits times tokens of a tile up to which merging them again in every program is worth a launch, or (where the launch is made
anyway, for others) the time until it is over. Counting gave 48 and 32; at 16 splits and one token an H100 took 7.9 µs for what
was counted as 3.6, and a step of 27 layers 0.1 ms less with the combine in front (2026-11-28)."""
MANY_PROGRAMS = 256
"""From here on tiles grow."""
MERGED_TOGETHER = 8
"""Tokens of a tile where splits are merged in it."""


@dataclass(frozen=True, slots=True)
class Shares:
    most: int
    """Splits of a sequence up to which `merge_and_expand` merges them itself; 1: none, `ALL`: any number."""

    @property
    def combines(self) -> bool:
        """Is there anything left for `combine`?"""
        return self.most != ALL


def shares(tokens: int, splits: int) -> Shares:
    """For a pass of `tokens` whose sequences have up to `splits` splits."""
    if MERGE_INSIDE is not None:
        return Shares(ALL if MERGE_INSIDE else 1)
    if splits <= 1 or tokens * splits <= WORTH_ALL:
        return Shares(ALL)
    return Shares(max(1, WORTH_SOME // tokens) if tokens <= MERGED_TOGETHER else 1)


@triton.jit(do_not_specialize=["tokens"])
def _merge_and_expand(
    values, latent, partial, lse, spans, up_v, tokens, HEADS: tl.constexpr, QUERIES: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (VALUE + BLOCK_V - 1) // BLOCK_V
    ROWS: tl.constexpr = HEADS * QUERIES
    pid = tl.program_id(0)
    head = pid // tiles % HEADS
    v = pid % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    t = pid // (tiles * HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, WIDTH)
    start_next(PDL, FIRST)
    w = tl.load(up_v + (head * VALUE + v).to(tl.int64)[:, None] * WIDTH + c[None, :], mask=(v < VALUE)[:, None], other=0.0)
    wait_for_inputs(PDL)
    sequence = t // QUERIES
    first = tl.load(spans + 2 * sequence, mask=t < tokens, other=0)
    count = tl.load(spans + 2 * sequence + 1, mask=t < tokens, other=-1) - first + 1
    # The decode has written what has one split, the combine what has more than MOST; an inert sequence has none: zeros.
    if MOST == 0:
        written = count == 1
    else:
        written = (count == 1) | (count > MOST)
    at = latent + ((t * HEADS + head).to(tl.int64) * WIDTH)[:, None] + c[None, :]
    x = tl.load(at, mask=written[:, None], other=0.0)
    if MOST != 1:
        own = tl.where(written, 0, count)
        row = t % QUERIES * HEADS + head
        # Finite, so that the difference of two is never NaN; a split without a visible key has -inf and weighs nothing.
        top = tl.full([BLOCK_T], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        acc = tl.zeros([BLOCK_T, WIDTH], tl.float32)
        for base in range(0, tl.max(own, 0), SPLITS):
            index = base + tl.arange(0, SPLITS)
            inside = index[None, :] < own[:, None]
            # A sequence's piece in its first part is slot 2p + 1, in a later part 2p.
            slot = 2 * (first[:, None] + index[None, :]) + (index == 0).to(tl.int32)[None, :]
            place = (slot * ROWS + row[:, None]).to(tl.int64)
            weight = tl.load(lse + place, mask=inside, other=float("-inf"))
            part = tl.load(partial + place[:, :, None] * WIDTH + c[None, None, :], mask=inside[:, :, None], other=0.0)
            # All loads are on their way before the first is waited for.
            tl.debug_barrier()
            new_top = tl.maximum(top, tl.max(weight, 1))
            alpha = tl.exp2(top - new_top)
            weight = tl.exp2(weight - new_top[:, None])
            total = total * alpha + tl.sum(weight, 1)
            acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 1)
            top = new_top
        merged = acc / tl.where(total > 0, total, 1.0)[:, None]
        x = tl.where((own > 0)[:, None], merged.to(x.dtype), x)
    start_next(PDL, LOADED)
    # The instruction takes eight tokens at least: fewer are repeated, and stored once.
    WIDE: tl.constexpr = BLOCK_T if BLOCK_T > 8 else 8
    x = tl.reshape(tl.broadcast_to(x[None, :, :], [WIDE // BLOCK_T, BLOCK_T, WIDTH]), [WIDE, WIDTH])
    out = dot(w, tl.trans(x), tl.zeros([BLOCK_V, WIDE], tl.float32))
    m = pid // (tiles * HEADS) * BLOCK_T + tl.arange(0, WIDE)
    there = (m < tokens) & (tl.arange(0, WIDE) < BLOCK_T)
    at = values + ((m * HEADS + head).to(tl.int64) * VALUE)[None, :] + v[:, None]
    tl.store(at, out.to(values.dtype.element_ty), mask=(v < VALUE)[:, None] & there[None, :])


def merge_and_expand(latent: Tensor, partial: Tensor, lse: Tensor, plan: DecodePlan, up_v: Tensor, most: int) -> Tensor:
    """latent [N, q, H, 512], of which sequences of one split, and of more than `most`, are read; partial [2 · parts, q · H,
    512] and lse [2 · parts, q · H], float32, in log2 units, of the others; up_v [H, Dv, 512] of latent's dtype
    → [N · q, H, Dv].

    Merged latents are rounded to that dtype. latent, partial, lse and up_v contiguous. `most`: of `Shares`.
    Reference: `replay.combine_reference`, `torch.bmm`.
    """
    sequences, queries, heads, width = latent.shape
    tokens, value = sequences * queries, up_v.shape[1]
    values = up_v.new_empty(tokens, heads, value)
    # One token: four warps, whose threads have the same columns of all splits, so merging them needs no barrier.
    block_v, block_t = expand_tile(tokens, heads, value, 64 if most == 1 else MERGED_TOGETHER)
    launch(
        _merge_and_expand, (-(-tokens // block_t) * heads * -(-value // block_v),),
        values, latent, partial, lse, plan.spans, up_v, tokens,
        HEADS=heads, QUERIES=queries, VALUE=value, WIDTH=width, MOST=most,
        SPLITS=16 if tokens == 1 else max(1, 8 // block_t), BLOCK_V=block_v, BLOCK_T=block_t,
        num_warps=4 if tokens == 1 else 8, **programmatic(latent.device),
    )  # fmt: skip
    return values


def expand_tile(tokens: int, heads: int, value: int, largest: int) -> tuple[int, int]:
    """(value rows, tokens) of a tile: small, and growing while there are more programs than two a multiprocessor. `largest`:
    tokens of a tile."""
    rows, together, largest = 32 if heads >= 16 else 16, min(16, power_of_2(tokens), largest), min(largest, tokens)
    while -(-tokens // together) * heads * -(-value // rows) >= MANY_PROGRAMS and (together < largest or rows < 64):
        if together < largest:
            together *= 2
        else:
            rows *= 2
    return rows, together
