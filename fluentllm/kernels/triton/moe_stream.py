"""Experts' products of few rows each: swapped operands, every chosen matrix streamed once (`streaming.stream`), BF16 or block
FP8.

As `moe_grouped`, for packed pairs with offsets on the device, and with the same tiles of pairs; which of the two is taken is
`moe_tiles.tile_for`'s choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, silu_of_rounded, start_next, wait_for_inputs
from .launch import bulk_copies, descriptor, launch, programmatic
from .streaming import stream

if TYPE_CHECKING:
    from torch import Tensor

    from .moe_sort import ExpertTiles
    from .moe_tiles import Tile


@triton.jit(do_not_specialize=["tiles", "scale_row"])
def _stream_kernel(out, x, x_scale, w, w_box, w_scale, order, offsets, tile_experts, tile_firsts, tiles, N, K, x_row, w_row,
                   scale_row, out_row, ROWS: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILE_GROUP: tl.constexpr, STAGES: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """GATED: x rows are tokens, gathered by `order`; an expert's ROWS rows are N of gate, then N of up; out is in sorted order.
    Else x is in sorted order, and out rows go where `order` says."""
    columns = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (TILE_GROUP * columns)
    size = tl.minimum(tiles - group * TILE_GROUP, TILE_GROUP)
    rest = pid % (TILE_GROUP * columns)
    tile = group * TILE_GROUP + rest % size
    n0 = rest // size * BLOCK_N
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        place = tl.load(tile_firsts + tile) + tl.arange(0, BLOCK_M)
        valid = place < tl.load(offsets + expert + 1)
        pair = tl.load(order + place, mask=valid, other=0)
        if GATED:
            row = (pair // TOP_K).to(tl.int64)
            target = place.to(tl.int64)
        else:
            row = place.to(tl.int64)
            target = pair.to(tl.int64)
        r0 = expert * ROWS
        acc, up = stream(x, x_scale, w, w_box, w_scale, row, valid, r0 + n0, r0 + N, N, K, x_row, w_row, scale_row, 0,
                         tl.cdiv(K, BLOCK_K), BLOCK_M, BLOCK_N, BLOCK_K, GATED, STAGES)  # fmt: skip
        start_next(PDL, LOADED)
        if GATED:
            acc = silu_of_rounded(acc, up, out.dtype.element_ty)
        n = n0 + tl.arange(0, BLOCK_N)
        tl.store(out + (target * out_row)[None, :] + n[:, None], acc.to(out.dtype.element_ty),
                 mask=valid[None, :] & (n < N)[:, None])  # fmt: skip


def stream_gate_up(
    x: Tensor,
    gate_up: Tensor,
    tiles: ExpertTiles,
    top_k: int,
    tile: Tile,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """x [T, hidden], gate_up [E, 2 I, hidden], contiguous (gate rows first) → silu(gate) · up of each pair, [T · K, I] in
    sorted order. With scales: both E4M3, x_scale [⌈hidden / 128⌉, T], w_scale [E, 2 I / 128, ⌈hidden / 128⌉]; I a multiple of
    128."""
    pairs, inner = tiles.order.shape[0], gate_up.shape[1] // 2
    out = torch.empty(pairs, inner, dtype=x.dtype if x_scale is None else torch.bfloat16, device=x.device)
    _launch(out, x, x_scale, gate_up, w_scale, tiles, inner, top_k, True, tile, max(16, tile.columns // 2))
    return out


def stream_down(
    h: Tensor,
    down: Tensor,
    tiles: ExpertTiles,
    tile: Tile,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """h [T · K, I] in sorted order, down [E, hidden, I], contiguous → [T · K, hidden] in the pairs' own order; rows of zero
    experts are not written. With scales as `stream_gate_up`; hidden a multiple of 128."""
    out = torch.empty(h.shape[0], down.shape[1], dtype=h.dtype if x_scale is None else torch.bfloat16, device=h.device)
    _launch(out, h, x_scale, down, w_scale, tiles, down.shape[1], 1, False, tile, tile.columns)
    return out


def _launch(
    out: Tensor, x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, tiles: ExpertTiles, n: int, top_k: int,
    gated: bool, tile: Tile, columns: int,
) -> None:  # fmt: skip
    count, flat = tiles.experts.shape[0], w.view(-1, w.shape[2])
    launch(
        _stream_kernel, (count * -(-n // columns),), out, x, x_scale, flat,
        descriptor(flat, columns, tile.depth) if tile.tma and bulk_copies(flat) else None, w_scale, tiles.order, tiles.offsets,
        tiles.experts, tiles.firsts, count, n, x.shape[1], x.stride(0), flat.stride(0),
        0 if x_scale is None else x_scale.stride(0), out.stride(0),
        ROWS=w.shape[1], TOP_K=top_k, GATED=gated, BLOCK_M=tile.rows, BLOCK_N=columns, BLOCK_K=tile.depth, TILE_GROUP=8,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages, **programmatic(x.device, "experts"),
    )  # fmt: skip
