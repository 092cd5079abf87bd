"""y = x Wᵀ for few rows of x on Hopper: every multiprocessor has one program, and each of them the same share of the weights.

The shares are cut from the matrix as from a ribbon: tile of 64 rows by tile, and in each along the depth. A program asks for
as much of its share as its ring holds before the kernels in front have ended, and its ring leaves room for a program of the
next such product, whose weights are so on their way while this one multiplies. A tile that several programs have parts of is
added up by the last of them, in their order.

    weights (64 rows × UNIT · 128 bytes a stage)   operands swapped: M of the matrix instruction
    tokens  (up to 64)                             N of it; FP8 sums are promoted to float32 every 128 columns
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..fp8_weight import on_hopper
from ..mla_decode.hopper_common import async_load, barrier, launch_dependents, wait_for_inputs
from .language import SCALE_BLOCK
from .launch import bulk_copies, launch, multiprocessors, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

ROWS: gl.constexpr = gl.constexpr(64)
"""Of a tile: a matrix instruction's."""
BYTES: gl.constexpr = gl.constexpr(128)
"""Columns are taken by as many as TMA swizzles; in E4M3 they share a scale."""
SHARED_BYTES = 113 * 1024 - 512
"""Of a program: two fit, this one and one of the next product."""
SCALE_BYTES = 16 * 1024
"""Of the scales of a program's share; longer shares are cut."""
MOST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PersistentTile:
    """Sizes of `persistent_product`."""

    tokens: int
    """8, 16, 32 or 64: rows of x, padded."""
    unit: int
    """Of 128 bytes of each row, in a stage."""
    programs: int
    """About as many as multiprocessors, or a multiple of that."""

    @property
    def rows(self) -> int:
        """Of the matrix, in a tile."""
        return ROWS.value


@cache
def persistent_tile(tokens: int, gated: bool, device: torch.device) -> PersistentTile | None:
    """For `tokens` rows of x; None where this kernel does not run, or not for so many."""
    runs = not knobs.runtime.interpret and (device.type == "meta" or on_hopper(device))
    if not runs or not 0 < tokens <= MOST_TOKENS:
        return None
    wide = max(8, power_of_2(tokens))
    unit = 4 if wide <= 16 and not gated else 1 if wide == 64 else 2
    return PersistentTile(wide, unit, multiprocessors(device))


@dataclass(frozen=True, slots=True)
class _Shares:
    """How a matrix is cut."""

    tiles: int
    units: int
    """Stages along the depth of a tile."""
    share: int
    """Stages of a program."""
    programs: int
    stages: int
    """Of the ring."""
    most: int
    """Programs that have parts of one tile."""


@cache
def _shares(rows: int, blocks: int, tile: PersistentTile, halves: int, scaled: bool) -> _Shares:
    """Of `rows` rows of a result, and `blocks` times 128 bytes of depth."""
    units = -(-blocks // tile.unit)
    tiles = -(-rows // ROWS.value)
    programs = tile.programs
    while True:
        share = -(-tiles * units // programs)
        scales = 4 * halves * tile.tokens * power_of_2(share * tile.unit) if scaled else 0
        if scales <= SCALE_BYTES or share == 1:
            break
        programs += tile.programs
    stage = tile.unit * BYTES.value * (ROWS.value * halves + tile.tokens)
    # What remains beside the scales, and a tile of sums that changes its layout.
    stages = (SHARED_BYTES - scales - 4 * ROWS.value * tile.tokens) // stage
    most = max(((i + 1) * units - 1) // share - i * units // share + 1 for i in range(tiles))
    return _Shares(tiles, units, share, -(-tiles * units // share), max(1, min(share, stages)), most)


@gluon.jit
def _ask_weights(w_box, w, there, at, stage, units, N, UNIT: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr):
    HALVES: gl.constexpr = 2 if GATED else 1
    row = at // units * ROWS
    column = at % units * (UNIT * COLUMNS)
    mbarrier.expect(there.index(stage), UNIT * HALVES * ROWS * BYTES)
    for i in gl.static_range(UNIT):
        place = (stage * UNIT + i) * HALVES
        async_load(w_box, [row, column + i * COLUMNS], there.index(stage), w.index(place))
        if GATED:
            async_load(w_box, [row + N, column + i * COLUMNS], there.index(stage), w.index(place + 1))


@gluon.jit
def _ask_tokens(x_box, x, there, at, stage, units, UNIT: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr):
    column = at % units * (UNIT * COLUMNS)
    mbarrier.expect(there.index(stage), UNIT * TOKENS * BYTES)
    for i in gl.static_range(UNIT):
        async_load(x_box, [0, column + i * COLUMNS], there.index(stage), x.index(stage * UNIT + i))


@gluon.jit
def _weight_scales(w_scale, begin, end, units, blocks, top, SHARE: gl.constexpr, UNIT: gl.constexpr, LAYOUT: gl.constexpr):
    """[SHARE]: of each 128 columns of the program's share; `top`: rows that its tiles are further down."""
    step = begin * UNIT + gl.arange(0, SHARE, LAYOUT)
    column = step % (units * UNIT)
    row = step // (units * UNIT) * ROWS + top
    inside = (step < end * UNIT) & (column < blocks)
    return gl.load(w_scale + row // SCALE_BLOCK * blocks + column, mask=inside, other=0.0)


@gluon.jit
def _multiply(w, x, scales, up_scales, acc, up, stage, step, UNIT: gl.constexpr, GATED: gl.constexpr, SCALED: gl.constexpr):
    """A stage's products added to the sums acc and up [64, TOKENS]. With scales each step of 128 columns has sums of its own,
    promoted here: tensor cores add E4M3 products up in fewer bits than float32."""
    HALVES: gl.constexpr = 2 if GATED else 1
    SUMS: gl.constexpr = acc.type.layout
    zero = gl.zeros_like(acc)
    found = ()
    for i in gl.static_range(UNIT):
        tokens = x.index(stage * UNIT + i).permute((1, 0))
        for half in gl.static_range(HALVES):
            rows = w.index((stage * UNIT + i) * HALVES + half)
            if SCALED:
                one = warpgroup_mma(rows, tokens, zero, use_acc=False, is_async=True)
                found = found + (one,)  # type: ignore[assignment]
            elif half == 0:
                acc = warpgroup_mma(rows, tokens, acc, is_async=True)
            else:
                up = warpgroup_mma(rows, tokens, up, is_async=True)
    if SCALED:
        if UNIT * HALVES == 1:
            found = (warpgroup_mma_wait(0, deps=found),)  # type: ignore[assignment]
        else:
            found = warpgroup_mma_wait(0, deps=found)
        for i in gl.static_range(UNIT):
            acc += found[i * HALVES] * scales.index(step + i).load(gl.SliceLayout(0, SUMS))[None, :]
            if GATED:
                up += found[i * HALVES + 1] * up_scales.index(step + i).load(gl.SliceLayout(0, SUMS))[None, :]
    elif GATED:
        acc, up = warpgroup_mma_wait(0, deps=[acc, up])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    return acc, up


@gluon.jit
def _finish(out, other, residual, norm, squares_out, y, n, m, n0, M, N, normed, out_row, other_row, residual_row, factor):
    """As `linear._finish`; y [64, TOKENS] float32 at rows m and columns n of the output."""
    inside = (m < M)[None, :] & (n < N)[:, None]
    row = m.to(gl.int64)
    if other is not None:
        rest = gl.load(other + (row * other_row)[None, :] + n[:, None], mask=inside, other=0.0)
        y = (y.to(out.dtype.element_ty).to(gl.float32) + rest.to(gl.float32)) * factor
    y = y.to(out.dtype.element_ty)
    if residual is not None:
        at = residual + (row * residual_row)[None, :] + n[:, None]
        # The sum has the stream's dtype, as an addition of its own would leave it.
        y = (y.to(gl.float32) + gl.load(at, mask=inside, other=0.0).to(gl.float32)).to(out.dtype.element_ty)
        gl.store(at, y, mask=inside)
    if norm is not None:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
        if n0 < normed:
            wide = gl.where(inside, y.to(gl.float32), 0.0)
            gl.store(squares_out + (n0 // ROWS).to(gl.int64) * M + m, gl.sum(wide * wide, 0), mask=m < M)
            weight = gl.load(norm + n, mask=n < N, other=0.0).to(gl.float32)
            y = (wide * weight[:, None]).to(out.dtype.element_ty)
    gl.store(out + (row * out_row)[None, :] + n[:, None], y, mask=inside)


@gluon.jit
def _norm_factor(squares, m, M, parts, size, eps, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """As `normed.norm_factor`: [TOKENS]."""
    part = gl.arange(0, PARTS, gl.SliceLayout(1, LAYOUT))
    inside = (part < parts)[:, None] & (m < M)[None, :]
    found = gl.load(squares + (part.to(gl.int64) * M)[:, None] + m[None, :], mask=inside, other=0.0)
    return gl.rsqrt(gl.sum(found, 0) / size + eps)


@gluon.jit(do_not_specialize=["M", "blocks", "scale_row", "factor", "parts", "eps", "normed"])
def _persistent_linear_kernel(out, x_box, x_scale, w_box, w_scale, other, residual, norm, squares, squares_out, partial,
                              counters, M, N, K, blocks, scale_row, out_row, other_row, residual_row, factor, units, share,
                              tiles, parts, eps, normed, TOKENS: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr,
                              SHARE: gl.constexpr, MOST: gl.constexpr, GATED: gl.constexpr, PARTS: gl.constexpr,
                              PDL: gl.constexpr):  # fmt: skip
    """units: stages along the depth of a tile; share: of a program; SHARE: 128s of columns in it, a power of two; MOST:
    programs that have parts of one tile. GATED: W holds N gate rows, then N up rows."""
    HALVES: gl.constexpr = 2 if GATED else 1
    SCALED: gl.constexpr = x_scale is not None
    COLUMNS: gl.constexpr = BYTES if w_box.dtype.primitive_bitwidth == 8 else BYTES // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 256 // w_box.dtype.primitive_bitwidth])
    # Neighbours in the output, a thread.
    LAYOUT: gl.constexpr = gl.BlockedLayout([4 if TOKENS == 8 else 8, 1], [16 if TOKENS == 8 else 8, 2 if TOKENS == 8 else 4],
                                            [1, 4], [0, 1])  # fmt: skip
    w = gl.allocate_shared_memory(w_box.dtype, [STAGES * UNIT * HALVES, ROWS, COLUMNS], w_box.layout)
    x = gl.allocate_shared_memory(x_box.dtype, [STAGES * UNIT, TOKENS, COLUMNS], x_box.layout)
    w_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(w_there.index(i), count=1)
        mbarrier.init(x_there.index(i), count=1)
    begin = gl.program_id(0) * share
    end = gl.minimum(begin + share, tiles * units)
    for i in gl.static_range(STAGES):
        if begin + i < end:
            _ask_weights(w_box, w, w_there, begin + i, i, units, N, UNIT, COLUMNS, GATED)
    if PDL:
        launch_dependents()
    if SCALED:
        FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        of_rows = _weight_scales(w_scale, begin, end, units, blocks, 0, SHARE, UNIT, gl.SliceLayout(1, FLAT))
        if GATED:
            of_up = _weight_scales(w_scale, begin, end, units, blocks, N, SHARE, UNIT, gl.SliceLayout(1, FLAT))
    wait_for_inputs(PDL)
    for i in gl.static_range(STAGES):
        if begin + i < end:
            _ask_tokens(x_box, x, x_there, begin + i, i, units, UNIT, COLUMNS, TOKENS)
    n = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    m = gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
    scales, up_scales = None, None
    if SCALED:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        column = (begin * UNIT + gl.arange(0, SHARE, gl.SliceLayout(1, FLAT))) % (units * UNIT)
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, FLAT))
        of_tokens = gl.load(x_scale + (column * scale_row)[:, None] + token[None, :],
                            mask=(column < blocks)[:, None] & (token < M)[None, :], other=0.0)  # fmt: skip
        scales = gl.allocate_shared_memory(gl.float32, [SHARE, TOKENS], PLAIN)
        scales.store(of_tokens * of_rows[:, None])
        scales = scales._reinterpret(gl.float32, [SHARE, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        if GATED:
            up_scales = gl.allocate_shared_memory(gl.float32, [SHARE, TOKENS], PLAIN)
            up_scales.store(of_tokens * of_up[:, None])
            up_scales = up_scales._reinterpret(gl.float32, [SHARE, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if PARTS > 0:
        rms = _norm_factor(squares, m, M, parts, K, eps, PARTS, LAYOUT)
    for tile in range(begin // units, (end - 1) // units + 1):
        low = gl.maximum(begin, tile * units)
        high = gl.minimum(end, (tile + 1) * units)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
        up = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
        for at in range(low, high):
            stage = (at - begin) % STAGES
            phase = (at - begin) // STAGES & 1
            mbarrier.wait(w_there.index(stage), phase)
            mbarrier.wait(x_there.index(stage), phase)
            acc, up = _multiply(w, x, scales, up_scales, acc, up, stage, (at - begin) * UNIT, UNIT, GATED, SCALED)
            if at + STAGES < end:
                # All warps have read the stage.
                barrier()
                _ask_weights(w_box, w, w_there, at + STAGES, stage, units, N, UNIT, COLUMNS, GATED)
                _ask_tokens(x_box, x, x_there, at + STAGES, stage, units, UNIT, COLUMNS, TOKENS)
        y = gl.convert_layout(acc, LAYOUT)
        second = gl.convert_layout(up, LAYOUT)
        whole = high - low == units
        if MOST > 1:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
            if not whole:
                PART: gl.constexpr = ROWS * TOKENS
                place = m[None, :] * ROWS + n[:, None]
                mine = partial + (2 * gl.program_id(0) + (low > begin)) * (HALVES * PART) + place
                gl.store(mine, y)
                if GATED:
                    gl.store(mine + PART, second)
                # All threads' sums are written before the one that counts says so.
                barrier()
                first = tile * units // share
                others = ((tile + 1) * units - 1) // share - first
                whole = gl.atomic_add(counters + tile, 1, sem="acq_rel") == others
                if whole:
                    y = gl.zeros_like(y)
                    second = gl.zeros_like(y)
                    for i in gl.static_range(MOST):
                        # A program's first part is in its first slot; that of the tile it ends in, in the other.
                        slot = 2 * (first + i) + ((first + i) * share < tile * units)
                        theirs = partial + slot * (HALVES * PART) + place
                        there = (place >= 0) & (i <= others)
                        y += gl.load(theirs, mask=there, other=0.0, cache_modifier=".cg")
                        if GATED:
                            second += gl.load(theirs + PART, mask=there, other=0.0, cache_modifier=".cg")
                    gl.store(counters + tile, 0)
        if whole:
            if PARTS > 0:
                y = y * rms[None, :]
                second = second * rms[None, :]
            if GATED:
                # Rounded first, as a product of its own would leave them.
                gate = y.to(out.dtype.element_ty).to(gl.float32)
                y = gate / (1.0 + gl.exp(-gate)) * second.to(out.dtype.element_ty).to(gl.float32)
            _finish(out, other, residual, norm, squares_out, y, tile * ROWS + n, m, tile * ROWS, M, N, normed, out_row,
                    other_row, residual_row, factor)  # fmt: skip


def takes(x: Tensor, weight: Tensor) -> bool:
    """Can TMA read both?"""
    return bulk_copies(x) and bulk_copies(weight)


def persistent_product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tile: PersistentTile,
    counters: Tensor,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    other: Tensor | None = None,
    factor: float = 1.0,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    squares_out: Tensor | None = None,
) -> None:
    """As `linear.linear` and `linear.linear_norm`, of which it is one of three ways: x [T, K] · weight [N, K]ᵀ → out [T, N];
    both in BF16, or in E4M3 with their scales.

    squares [parts, T]: of x's norm, whose factor is applied here. norm: weight of the norm of the first columns, of which
    squares_out [⌈columns / 64⌉, T] gets the sums of squares.
    """
    tokens, depth = x.shape
    rows = out.shape[1]
    columns = BYTES.value // weight.element_size()
    blocks = -(-depth // columns)
    halves = 2 if gated else 1
    cut = _shares(rows, blocks, tile, halves, x_scale is not None)
    parts = 0 if squares is None else squares.shape[0]
    partial = None
    if cut.most > 1:
        # A program's first tile and its last may be others' too.
        sums = 2 * cut.programs * halves * ROWS.value * tile.tokens
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    launch(
        _persistent_linear_kernel, (cut.programs,), out, _box(x, tile.tokens, columns), x_scale,
        _box(weight, ROWS.value, columns), w_scale, other, residual, norm, squares, squares_out, partial, counters,
        tokens, rows, depth, blocks, 0 if x_scale is None else x_scale.stride(0), out.stride(0),
        0 if other is None or other.ndim == 1 else other.stride(0), 0 if residual is None else residual.stride(0),
        factor, cut.units, cut.share, cut.tiles, parts, eps, 0 if norm is None else norm.shape[0],
        TOKENS=tile.tokens, UNIT=tile.unit, STAGES=cut.stages, SHARE=power_of_2(cut.share * tile.unit), MOST=cut.most,
        GATED=gated, PARTS=power_of_2(parts) if parts else 0, num_warps=4, **programmatic(x.device, "product"),
    )  # fmt: skip


def _box(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For TMA, `rows` × 128 bytes of a matrix; outside of it there are zeros."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
