"""MLA's decode of few tokens before attention, in one launch: queries times up_k, rotary of the queries, and the KV write.

The first programs do a token's KV each, the next rotate a token's queries, all others do a tile of a head's product: at 16
heads 128 of them, of which each reads 16 KB of weights, once. They ask for these before they wait for the kernels in front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, dot, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .mla_rows import append_or_rotate

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 64
"""More go the way of larger batches: each step a launch of its own, products by the library. 0: all do."""
FEW_HEADS = 8
"""Up to here tiles have half the columns, so that there are programs enough."""


def absorbs(tokens: int, query_length: int | None) -> bool:
    """Is a pass of these sizes done this way? `query_length`: the batch's, None in prefill."""
    return query_length is not None and tokens <= MOST_TOKENS


@triton.jit
def absorb_tile(out, q, up_k, pid, tokens, q_row, q_head, HEADS: tl.constexpr, NOPE: tl.constexpr, WIDTH: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Tile `pid` of q[t, h] up_k[h] → out [T, HEADS, WIDTH], contiguous like up_k. The columns are the M of the instruction, as
    few as the tokens are. Waits for the kernels in front by itself."""
    columns: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    head = pid // columns % HEADS
    c = pid % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    t = pid // (columns * HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    at = up_k + (head * NOPE + k).to(tl.int64)[:, None] * WIDTH + c[None, :]
    w = tl.load(at, mask=(k < NOPE)[:, None] & (c < WIDTH)[None, :], other=0.0)
    wait_for_inputs(PDL)
    at = q + (t.to(tl.int64) * q_row)[:, None] + head * q_head + k[None, :]
    x = tl.load(at, mask=(t < tokens)[:, None] & (k < NOPE)[None, :], other=0.0)
    start_next(PDL, LOADED)
    acc = dot(tl.trans(w), tl.trans(x), tl.zeros([BLOCK_C, BLOCK_T], tl.float32))
    at = out + ((t * HEADS + head).to(tl.int64) * WIDTH)[None, :] + c[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(c < WIDTH)[:, None] & (t < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _absorb_kernel(out, rotated, cache, q, up_k, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, tokens, q_row, q_head,
                   kv_row, cache_row, rope_row, HEADS: tl.constexpr, NOPE: tl.constexpr, WIDTH: tl.constexpr,
                   ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    before = tokens * (1 + (HEADS + BLOCK_H - 1) // BLOCK_H)
    pid = tl.program_id(0)
    start_next(PDL, FIRST)
    if pid < before:
        append_or_rotate(pid, rotated, cache, q + NOPE, kv, kv_weight, cos, sin, kv_rows, eps, latent_scale, tokens, q_row,
                         q_head, kv_row, cache_row, rope_row, HEADS, WIDTH, ROPE, INTERLEAVED, BLOCK_H, BLOCK_W, BLOCK_R,
                         PDL)  # fmt: skip
    else:
        absorb_tile(out, q, up_k, pid - before, tokens, q_row, q_head, HEADS, NOPE, WIDTH, BLOCK_K, BLOCK_C, BLOCK_T, PDL)


def absorb(
    q: Tensor,
    up_k: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    cache: Tensor,
    *,
    eps: float,
    latent_scale: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [T, H, nope + R] (last dimension contiguous), up_k [H, nope, C] contiguous → q's first part times up_k [T, H, C], its
    rotated rest [T, H, R], both contiguous.

    kv [T, C + R] and what follows: as for `mla_rows.append_latents`, whose work is done in the same launch.
    Reference: `torch.bmm`, `PlainOps.rotary`; `append_latents`'.
    """
    tokens, heads, _ = q.shape
    nope, width = up_k.shape[1:]
    rope = cos.shape[-1]
    out, rotated = q.new_empty(tokens, heads, width), q.new_empty(tokens, heads, rope)
    block_h = min(16, power_of_2(heads))
    tiles, sizes = absorb_tiles(tokens, heads, nope, width)
    launch(
        _absorb_kernel, (tokens * (1 + -(-heads // block_h)) + tiles,), out, rotated, cache, q, up_k, kv, kv_weight, cos, sin,
        kv_rows, eps, latent_scale, tokens, q.stride(0), q.stride(1), kv.stride(0), cache.stride(0), cos.stride(0),
        HEADS=heads, NOPE=nope, WIDTH=width, ROPE=rope, INTERLEAVED=interleaved, BLOCK_H=block_h, BLOCK_W=power_of_2(width),
        BLOCK_R=power_of_2(rope), num_warps=4, **sizes, **programmatic(q.device),
    )  # fmt: skip
    return out, rotated


def absorb_tiles(tokens: int, heads: int, nope: int, width: int) -> tuple[int, dict[str, int]]:
    """(number of tiles, their sizes) of `absorb_tile`. All tokens share a tile: each weight passes through the chip once."""
    block_t, block_c = min(64, max(8, power_of_2(tokens))), 32 if heads <= FEW_HEADS else 64
    tiles = -(-tokens // block_t) * heads * -(-width // block_c)
    return tiles, {"BLOCK_K": max(16, power_of_2(nope)), "BLOCK_C": block_c, "BLOCK_T": block_t}
