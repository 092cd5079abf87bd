"""Experts' products in block FP8 on Hopper: a persistent, warp-specialised Gluon kernel, two programs a multiprocessor.

A program takes an item (a tile of pairs × 128 rows of its expert's matrix) after the other:

    loader (1 warp)     TMA: a step's weights, 2 × 64 rows × 128 columns, and the pairs' columns, into a ring
    products (4 warps)  operands swapped, FP8 WGMMA over 128 columns, promoted to float32 with both scales

Matrices are short in depth (8 to 24 steps), so a program for each item would spend as long on filling its ring as on its
products. Here the loader runs on into the next item while this one's sums are promoted and stored, and what one program waits
for, its neighbour on the multiprocessor does not: memory sets the pace. Pairs lie in the order of their experts (`moe_pack`),
so that TMA reads them too. BF16 needs none of this: nothing is promoted, and `moe_stream` reads at memory's pace as it is.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..fp8_weight import on_hopper
from .hopper_language import async_load, launch_dependents, wait_for_inputs
from .language import SCALE_BLOCK
from .launch import launch, multiprocessors, programmatic

if TYPE_CHECKING:
    from torch import Tensor

    from .moe_sort import ExpertTiles

DEPTH: gl.constexpr = SCALE_BLOCK
"""Columns a step: what a scale is for, and 128 bytes are what TMA swizzles."""
HALF: gl.constexpr = gl.constexpr(64)
"""Rows of a matrix instruction; an item has two: gate and up, or two neighbours."""
GROUP: gl.constexpr = gl.constexpr(8)
"""Tiles of pairs that take the same rows of their matrices one after the other."""
SHARED_BYTES = 106 * 1024
"""Of a program's ring: two programs fit."""
REGISTERS = 128
"""A thread when a program starts; the loader gives away most of its own."""


@cache
def persistent(device: torch.device) -> bool:
    """Does this kernel run there? On Hopper, and in the compile check."""
    return not knobs.runtime.interpret and (device.type == "meta" or on_hopper(device))


def tile_rows(pairs: int, experts: int) -> int:
    """Pairs of a tile, by how many an expert gets on average; measured, see benchmarks/kernels/NOTES.md."""
    each = pairs / experts
    return 16 if each <= 6 else 32 if each <= 16 else 64


class Items(NamedTuple):
    """What the sort left (`moe_sort.ExpertTiles`), and how an expert's matrix is cut."""

    experts: Any
    firsts: Any
    used: Any
    order: Any
    offsets: Any
    columns: Any
    """Tiles of rows of a matrix."""
    steps: Any
    """Along its depth."""
    N: Any
    """Columns of the output."""


class Ring(NamedTuple):
    """Steps of weights and pairs in shared memory, and the barriers that say that one is there, and free again."""

    w: Any
    x: Any
    full: Any
    empty: Any


@gluon.jit
def _item(item, used, items):
    """Expert, first place and column of an item."""
    group = item // (GROUP * items.columns)
    size = gl.minimum(used - group * GROUP, GROUP)
    rest = item % (GROUP * items.columns)
    tile = group * GROUP + rest % size
    return gl.load(items.experts + tile), gl.load(items.firsts + tile), rest // size


@gluon.jit
def _loader(w_box, x_box, ring, items, ROWS: gl.constexpr, GATED: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
            PDL: gl.constexpr):  # fmt: skip
    wait_for_inputs(PDL)
    used = gl.load(items.used)
    step = 0
    for item in range(gl.program_id(0), used * items.columns, gl.num_programs(0)):
        expert, first, column = _item(item, used, items)
        top = expert * ROWS + column * (HALF if GATED else 2 * HALF)
        bottom = top + (items.N if GATED else HALF)
        for index in range(0, items.steps):
            stage = step % STAGES
            mbarrier.wait(ring.empty.index(stage), ((step // STAGES) & 1) ^ 1)
            there = ring.full.index(stage)
            mbarrier.expect(there, (2 * HALF + TOKENS) * DEPTH)
            async_load(w_box, [top, index * DEPTH], there, ring.w.index(2 * stage))
            async_load(w_box, [bottom, index * DEPTH], there, ring.w.index(2 * stage + 1))
            async_load(x_box, [first, index * DEPTH], there, ring.x.index(stage))
            step += 1


@gluon.jit
def _sums(ring, scale_at, top_at, bottom_at, inside, scale_row, step, steps, TOKENS: gl.constexpr, STAGES: gl.constexpr):
    """An item's two sums [64, TOKENS]. Scales are loaded a step ahead; a step's sums are promoted before the next begins, since
    the tensor cores add E4M3 products up in fewer bits than float32."""
    zero = gl.zeros([HALF, TOKENS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32]))
    top = zero
    bottom = zero
    scale = gl.load(scale_at, mask=inside, other=0.0)
    above = gl.load(top_at)
    below = gl.load(bottom_at)
    for index in range(0, steps):
        stage = step % STAGES
        following = gl.minimum(index + 1, steps - 1)
        next_scale = gl.load(scale_at + following * scale_row, mask=inside, other=0.0)
        next_above = gl.load(top_at + following)
        next_below = gl.load(bottom_at + following)
        mbarrier.wait(ring.full.index(stage), (step // STAGES) & 1)
        pairs = ring.x.index(stage).permute((1, 0))
        first = warpgroup_mma(ring.w.index(2 * stage), pairs, zero, use_acc=False, is_async=True)
        second = warpgroup_mma(ring.w.index(2 * stage + 1), pairs, zero, use_acc=False, is_async=True)
        first, second = warpgroup_mma_wait(0, deps=[first, second])
        mbarrier.arrive(ring.empty.index(stage), count=1)
        top += first * (scale * above)[None, :]
        bottom += second * (scale * below)[None, :]
        scale = next_scale
        above = next_above
        below = next_below
        step += 1
    return top, bottom


@gluon.jit
def _store(out, value, target, inside, n0, N, out_row, LAYOUT: gl.constexpr):
    """[64, TOKENS] to rows `target` of out, 16 bytes a thread."""
    n = n0 + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    value = gl.convert_layout(value.to(out.dtype.element_ty), LAYOUT)
    gl.store(out + (target * out_row)[None, :] + n[:, None], value, mask=inside[None, :] & (n < N)[:, None])


@gluon.jit
def _products(out, x_scale, w_scale, ring, items, scale_row, out_row, ROWS: gl.constexpr, GATED: gl.constexpr,
              TOKENS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    wait_for_inputs(PDL)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    # Eight rows of the matrix, which are neighbours in the output, a thread.
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    pair = gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
    used = gl.load(items.used)
    step = 0
    for item in range(gl.program_id(0), used * items.columns, gl.num_programs(0)):
        expert, first, column = _item(item, used, items)
        last = gl.load(items.offsets + expert + 1)
        inside = first + pair < last
        n0 = column * (HALF if GATED else 2 * HALF)
        target = first + pair
        if not GATED:
            target = gl.load(items.order + target, mask=inside, other=0)
        target = target.to(gl.int64)
        place = first + gl.arange(0, TOKENS, gl.SliceLayout(0, SUMS))
        row = expert * ROWS + n0
        top, bottom = _sums(ring, x_scale + place, w_scale + row // SCALE_BLOCK * items.steps,
                            w_scale + (row + items.N if GATED else row) // SCALE_BLOCK * items.steps, place < last, scale_row,
                            step, items.steps, TOKENS, STAGES)  # fmt: skip
        if GATED:
            # Rounded first, as a product of its own would leave them.
            gate = top.to(out.dtype.element_ty).to(gl.float32)
            up = bottom.to(out.dtype.element_ty).to(gl.float32)
            _store(out, gate / (1.0 + gl.exp(-gate)) * up, target, inside, n0, items.N, out_row, LAYOUT)
        else:
            _store(out, top, target, inside, n0, items.N, out_row, LAYOUT)
            _store(out, bottom, target, inside, n0 + HALF, items.N, out_row, LAYOUT)
        step += items.steps


@gluon.jit(do_not_specialize=["scale_row"])
def _persistent_kernel(out, x_box, x_scale, w_box, w_scale, order, offsets, tile_experts, tile_firsts, used_at, columns, steps,
                       N, scale_row, out_row, ROWS: gl.constexpr, GATED: gl.constexpr, TOKENS: gl.constexpr,
                       STAGES: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """GATED: an expert's ROWS rows are N of gate, then N of up; out is in the order of experts. Else out rows go where `order`
    says."""
    w = gl.allocate_shared_memory(w_box.dtype, [2 * STAGES, HALF, DEPTH], w_box.layout)
    x = gl.allocate_shared_memory(x_box.dtype, [STAGES, TOKENS, DEPTH], x_box.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    if PDL:
        launch_dependents()
    ring = Ring(w, x, full, empty)
    items = Items(tile_experts, tile_firsts, used_at, order, offsets, columns, steps, N)
    gl.warp_specialize(
        [
            (_products, (out, x_scale, w_scale, ring, items, scale_row, out_row, ROWS, GATED, TOKENS, STAGES, PDL)),
            (_loader, (w_box, x_box, ring, items, ROWS, GATED, TOKENS, STAGES, PDL)),
        ],
        [1],
        [24],
    )


def persistent_gate_up(x: Tensor, x_scale: Tensor, gate_up: Tensor, w_scale: Tensor, tiles: ExpertTiles) -> Tensor:
    """x E4M3 [pairs, hidden] in the order of experts (`moe_pack`) with x_scale float32 [⌈hidden / 128⌉, pairs], gate_up E4M3
    [E, 2 I, hidden], contiguous (gate rows first) with w_scale float32 [E, 2 I / 128, ⌈hidden / 128⌉] → silu(gate) · up of
    each pair, [pairs, I], BF16, in the same order. I a multiple of 128, hidden of 16; tiles of 16 to 64 rows."""
    out = torch.empty(x.shape[0], gate_up.shape[1] // 2, dtype=torch.bfloat16, device=x.device)
    _launch(out, x, x_scale, gate_up, w_scale, tiles, True)
    return out


def persistent_down(h: Tensor, h_scale: Tensor, down: Tensor, w_scale: Tensor, tiles: ExpertTiles) -> Tensor:
    """h E4M3 [pairs, I] in the order of experts with its scale, down E4M3 [E, hidden, I], contiguous, with w_scale float32
    [E, hidden / 128, ⌈I / 128⌉] → [pairs, hidden], BF16, in the pairs' own order; rows of zero experts are not written.
    hidden a multiple of 128."""
    out = torch.empty(h.shape[0], down.shape[1], dtype=torch.bfloat16, device=h.device)
    _launch(out, h, h_scale, down, w_scale, tiles, False)
    return out


def _launch(out: Tensor, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, tiles: ExpertTiles, gated: bool) -> None:
    if not out.shape[0]:
        return  # TMA has no boxes of nothing
    flat, n, depth, half = w.view(-1, w.shape[2]), out.shape[1], DEPTH.value, HALF.value
    columns = -(-n // (half if gated else 2 * half))
    stages = min(10, SHARED_BYTES // (depth * (tiles.rows + 2 * half)))
    launch(
        _persistent_kernel, (min(2 * multiprocessors(x.device), tiles.experts.shape[0] * columns),), out,
        _box(x, tiles.rows), x_scale, _box(flat, half), w_scale, tiles.order, tiles.offsets, tiles.experts, tiles.firsts,
        tiles.used, columns, -(-x.shape[1] // depth), n, x_scale.stride(0), out.stride(0),
        ROWS=w.shape[1], GATED=gated, TOKENS=tiles.rows, STAGES=stages, num_warps=4, maxnreg=REGISTERS,
        **programmatic(x.device, "experts"),
    )  # fmt: skip


def _box(matrix: Tensor, rows: int) -> TensorDescriptor:
    """For TMA, `rows` × 128 columns of a matrix of bytes; outside of it there are zeros."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, DEPTH.value], layout)
