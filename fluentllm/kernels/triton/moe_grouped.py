"""Products of sorted rows with their experts' matrices: one program a tile of rows × columns, BF16 in, float32 sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .language import FIRST, LOADED, dot, silu_of_rounded, start_next, wait_for_inputs
from .launch import launch, programmatic

if TYPE_CHECKING:
    from torch import Tensor

    from .moe_sort import ExpertTiles
    from .moe_tiles import Tile


@triton.jit
def _grouped_kernel(
    out, x, w, order, offsets, tile_experts, tile_firsts, tiles, x_row, w_expert, w_row, out_row,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILE_GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """GATED: x rows are tokens, gathered by `order`; w holds N gate rows, then N up rows; out is in sorted order.
    Else x is in sorted order, and out rows go where `order` says."""
    # Tiles of one expert lie side by side: taking columns in the outer loop of a group lets them share the expert's weights.
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = pid // (TILE_GROUP * columns)
    size = tl.minimum(tiles - group * TILE_GROUP, TILE_GROUP)
    rest = pid % (TILE_GROUP * columns)
    tile = group * TILE_GROUP + rest % size
    column = rest // size
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
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_at = x + (row * x_row)[:, None] + k[None, :]
        w_at = w + expert.to(tl.int64) * w_expert + (n.to(tl.int64) * w_row)[:, None] + k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if GATED:
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for base in range(0, K, BLOCK_K):
            deep = (base + k < K)[None, :]
            a = tl.load(x_at + base, mask=valid[:, None] & deep, other=0.0)
            b = tl.load(w_at + base, mask=(n < N)[:, None] & deep, other=0.0)
            acc = dot(a, tl.trans(b), acc)
            if GATED:
                b = tl.load(w_at + N * w_row + base, mask=(n < N)[:, None] & deep, other=0.0)
                up = dot(a, tl.trans(b), up)
        start_next(PDL, LOADED)
        if GATED:
            acc = silu_of_rounded(acc, up, out.dtype.element_ty)
        at = out + (target * out_row)[:, None] + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (n < N)[None, :])


def grouped_gate_up(x: Tensor, gate_up: Tensor, tiles: ExpertTiles, top_k: int, tile: Tile) -> Tensor:
    """x [T, hidden], gate_up [E, 2 I, hidden] (gate rows first) → silu(gate) · up of each pair, [T · K, I] in sorted order."""
    pairs, inner = tiles.order.shape[0], gate_up.shape[1] // 2
    out = x.new_empty(pairs, inner)
    # Two sums a program: half the columns.
    columns = max(32, tile.columns // 2) if tile.rows > 16 else tile.columns // 2
    _launch(out, x, gate_up, tiles, inner, top_k, True, tile, columns)
    return out


def grouped_down(h: Tensor, down: Tensor, tiles: ExpertTiles, tile: Tile) -> Tensor:
    """h [T · K, I] in sorted order, down [E, hidden, I] → [T · K, hidden] in the pairs' own order; rows of zero experts are not
    written."""
    out = h.new_empty(h.shape[0], down.shape[1])
    _launch(out, h, down, tiles, down.shape[1], 1, False, tile, tile.columns)
    return out


def _launch(
    out: Tensor, x: Tensor, w: Tensor, tiles: ExpertTiles, n: int, top_k: int, gated: bool, tile: Tile, columns: int
) -> None:
    count = tiles.experts.shape[0]
    launch(
        _grouped_kernel, (count * -(-n // columns),), out, x, w, tiles.order, tiles.offsets, tiles.experts, tiles.firsts, count,
        x.stride(0), w.stride(0), w.stride(1), out.stride(0),
        N=n, K=x.shape[1], TOP_K=top_k, GATED=gated, BLOCK_M=tile.rows, BLOCK_N=columns, BLOCK_K=tile.depth, TILE_GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages, **programmatic(x.device, "experts"),
    )  # fmt: skip
