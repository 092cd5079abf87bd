"""y = x Wᵀ for few rows of x on Hopper: a program asks for its weights before the kernels in front have ended.

A program has a tile of 64 rows of the matrix, or a few, and its ring leaves room for a program of the next such product on the
same multiprocessor, whose weights so are on their way while this one multiplies. Tiles that are better shared by several
programs are `cuda.linear_cluster`'s.

    weights (64 rows × UNIT · 128 bytes a stage)   operands swapped: M of the matrix instruction
    tokens  (up to 64)                             N of it; FP8 sums are promoted to float32 every 128 columns
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_language import async_load, barrier, launch_dependents, wait_for_inputs
from .hopper_tiles import BYTES, ROWS, fits, stages_of
from .language import SCALE_BLOCK
from .launch import bulk_copies, launch, power_of_2, programmatic

if TYPE_CHECKING:
    from torch import Tensor

    from .hopper_tiles import HopperTile
    from .row_product import RowProduct

REINTERPRETS: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Triton 3.9 renamed it."""


class Rings(NamedTuple):
    """Stages of weights and tokens in shared memory, and the barriers that say that one is there. A stage is free again when
    all warps have met behind its products."""

    w: Any
    x: Any
    w_there: Any
    x_there: Any


class Ends(NamedTuple):
    """What happens at both ends of the product: `row_product.RowProduct`."""

    other: Any
    residual: Any
    norm: Any
    squares: Any
    squares_out: Any
    other_row: Any
    residual_row: Any
    factor: Any
    parts: Any
    eps: Any
    normed: Any


@gluon.jit
def _ask_weights(w_box, rings, tile, unit, stage, N, UNIT: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr):
    HALVES: gl.constexpr = 2 if GATED else 1
    there = rings.w_there.index(stage)
    mbarrier.expect(there, UNIT * HALVES * ROWS * BYTES)
    for i in gl.static_range(UNIT):
        column = (unit * UNIT + i) * COLUMNS
        for half in gl.static_range(HALVES):
            place = (stage * UNIT + i) * HALVES + half
            async_load(w_box, [tile * ROWS + half * N, column], there, rings.w.index(place))


@gluon.jit
def _ask_tokens(x_box, rings, unit, stage, UNIT: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr):
    there = rings.x_there.index(stage)
    mbarrier.expect(there, UNIT * TOKENS * BYTES)
    for i in gl.static_range(UNIT):
        async_load(x_box, [0, (unit * UNIT + i) * COLUMNS], there, rings.x.index(stage * UNIT + i))


@gluon.jit
def _scales_there(scales, of_rows, of_tokens, SCALES: gl.constexpr, TOKENS: gl.constexpr):
    """Their product [SCALES, TOKENS] in shared memory, a step's by its index."""
    scales.store(of_tokens * of_rows[:, None])
    STEP: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if REINTERPRETS:
        scales = scales.reinterpret(gl.float32, [SCALES, TOKENS], STEP)
    else:
        scales = scales._reinterpret(gl.float32, [SCALES, TOKENS], STEP)
    return scales


@gluon.jit
def _multiply(rings, scales, up_scales, acc, up, stage, step, UNIT: gl.constexpr, GATED: gl.constexpr, SCALED: gl.constexpr):
    """A stage's products added to the sums acc and up [64, TOKENS]. With scales each step of 128 columns has sums of its own,
    promoted here: tensor cores add E4M3 products up in fewer bits than float32."""
    HALVES: gl.constexpr = 2 if GATED else 1
    SUMS: gl.constexpr = acc.type.layout
    zero = gl.zeros_like(acc)
    found = ()
    for i in gl.static_range(UNIT):
        tokens = rings.x.index(stage * UNIT + i).permute((1, 0))
        for half in gl.static_range(HALVES):
            rows = rings.w.index((stage * UNIT + i) * HALVES + half)
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
def _finish(out, ends, y, n, m, n0, M, N, out_row):
    """As `linear_streamed._finish`; y [64, TOKENS] float32 at rows m and columns n of the output."""
    inside = (m < M)[None, :] & (n < N)[:, None]
    row = m.to(gl.int64)
    if ends.other is not None:
        rest = gl.load(ends.other + (row * ends.other_row)[None, :] + n[:, None], mask=inside, other=0.0)
        y = (y.to(out.dtype.element_ty).to(gl.float32) + rest.to(gl.float32)) * ends.factor
    y = y.to(out.dtype.element_ty)
    if ends.residual is not None:
        at = ends.residual + (row * ends.residual_row)[None, :] + n[:, None]
        # The sum has the stream's dtype, as an addition of its own would leave it.
        y = (y.to(gl.float32) + gl.load(at, mask=inside, other=0.0).to(gl.float32)).to(out.dtype.element_ty)
        gl.store(at, y, mask=inside)
    if ends.norm is not None:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
        if n0 < ends.normed:
            wide = gl.where(inside, y.to(gl.float32), 0.0)
            gl.store(ends.squares_out + (n0 // ROWS).to(gl.int64) * M + m, gl.sum(wide * wide, 0), mask=m < M)
            weight = gl.load(ends.norm + n, mask=n < N, other=0.0).to(gl.float32)
            y = (wide * weight[:, None]).to(out.dtype.element_ty)
    gl.store(out + (row * out_row)[None, :] + n[:, None], y, mask=inside)


@gluon.jit
def _norm_factor(ends, m, M, size, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """As `normed.norm_factor`: [TOKENS]."""
    part = gl.arange(0, PARTS, gl.SliceLayout(1, LAYOUT))
    inside = (part < ends.parts)[:, None] & (m < M)[None, :]
    found = gl.load(ends.squares + (part.to(gl.int64) * M)[:, None] + m[None, :], mask=inside, other=0.0)
    return gl.rsqrt(gl.sum(found, 0) / size + ends.eps)


@gluon.jit
def _leave(out, ends, y, up, n, m, tile, M, N, K, out_row, GATED: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """The end of a tile's sums [64, TOKENS]: the factor of x's norm, SwiGLU, and `_finish`."""
    if PARTS > 0:
        rms = _norm_factor(ends, m, M, K, PARTS, LAYOUT)[None, :]
        y = y * rms
        up = up * rms
    if GATED:
        # Rounded first, as a product of its own would leave them.
        gate = y.to(out.dtype.element_ty).to(gl.float32)
        y = gate / (1.0 + gl.exp(-gate)) * up.to(out.dtype.element_ty).to(gl.float32)
    _finish(out, ends, y, tile * ROWS + n, m, tile * ROWS, M, N, out_row)


@gluon.jit(do_not_specialize=["M", "blocks", "scale_row", "factor", "parts", "eps", "normed"])
def _hopper_linear_kernel(out, x_box, x_scale, w_box, w_scale, other, residual, norm, squares, squares_out, M, N, K, blocks,
                          scale_row, out_row, other_row, residual_row, factor, units, tiles, together, parts, eps, normed,
                          TOKENS: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr, SCALES: gl.constexpr,
                          GATED: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """units: stages along the depth of a tile; together: tiles of a program; SCALES: 128s of columns that a program has scales
    for, a power of two. GATED: W holds N gate rows, then N up rows."""
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
    rings = Rings(w, x, w_there, x_there)
    ends = Ends(other, residual, norm, squares, squares_out, other_row, residual_row, factor, parts, eps, normed)
    first = gl.program_id(0) * together
    total = units * gl.minimum(together, tiles - first)
    for i in gl.static_range(STAGES):
        if i < total:
            _ask_weights(w_box, rings, first + i // units, i % units, i, N, UNIT, COLUMNS, GATED)
    if PDL:
        launch_dependents()
    if SCALED:
        FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        step = gl.arange(0, SCALES, gl.SliceLayout(1, FLAT))
        column = step % (units * UNIT)
        row = (first + step // (units * UNIT)) * ROWS
        inside = (step < total * UNIT) & (column < blocks)
        of_rows = gl.load(w_scale + row // SCALE_BLOCK * blocks + column, mask=inside, other=0.0)
        if GATED:
            of_up = gl.load(w_scale + (row + N) // SCALE_BLOCK * blocks + column, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    for i in gl.static_range(STAGES):
        if i < total:
            _ask_tokens(x_box, rings, i % units, i, UNIT, COLUMNS, TOKENS)
    scales, up_scales = None, None
    if SCALED:
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, FLAT))
        of_tokens = gl.load(x_scale + (column * scale_row)[:, None] + token[None, :],
                            mask=inside[:, None] & (token < M)[None, :], other=0.0)  # fmt: skip
        scales = gl.allocate_shared_memory(gl.float32, [SCALES, TOKENS], PLAIN)
        scales = _scales_there(scales, of_rows, of_tokens, SCALES, TOKENS)
        if GATED:
            up_scales = gl.allocate_shared_memory(gl.float32, [SCALES, TOKENS], PLAIN)
            up_scales = _scales_there(up_scales, of_up, of_tokens, SCALES, TOKENS)
    n = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    m = gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
    for index in range(0, total // units):
        acc = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
        up = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
        for at in range(index * units, (index + 1) * units):
            stage = at % STAGES
            mbarrier.wait(rings.w_there.index(stage), at // STAGES & 1)
            mbarrier.wait(rings.x_there.index(stage), at // STAGES & 1)
            acc, up = _multiply(rings, scales, up_scales, acc, up, stage, at * UNIT, UNIT, GATED, SCALED)
            later = at + STAGES
            if later < total:
                # All warps have read the stage.
                barrier()
                _ask_weights(w_box, rings, first + later // units, later % units, stage, N, UNIT, COLUMNS, GATED)
                _ask_tokens(x_box, rings, later % units, stage, UNIT, COLUMNS, TOKENS)
        y = gl.convert_layout(acc, LAYOUT)
        y_up = gl.convert_layout(up, LAYOUT)
        _leave(out, ends, y, y_up, n, m, first + index, M, N, K, out_row, GATED, PARTS, LAYOUT)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Can TMA read both?"""
    return bulk_copies(x) and bulk_copies(weight)


def hopper_product(product: RowProduct, tile: HopperTile) -> None:
    """One of the ways of `linear`: both operands in BF16 (or float16), or in E4M3 with their scales. Raises `ValueError` for
    operands that TMA cannot read, and for a tile that does not fit them."""
    p = product
    width = p.weight.element_size()
    columns = BYTES.value // width
    blocks, tiles = -(-p.depth // columns), -(-p.rows // ROWS.value)
    units = -(-blocks // tile.unit)
    if not takes(p.x, p.weight):
        raise ValueError("operands that TMA cannot read: their rows must be aligned to 16 bytes")
    if not fits(tile, p.depth, width, p.gated):
        raise ValueError(
            f"{tile} does not fit {p.depth} columns into shared memory: take a smaller unit, or fewer tiles together"
        )
    launch(
        _hopper_linear_kernel, (-(-tiles // tile.together),), p.out, _box(p.x, tile.tokens, columns), p.x_scale,
        _box(p.weight, ROWS.value, columns), p.w_scale, p.other, p.residual, p.norm, p.squares, p.squares_out, p.tokens, p.rows,
        p.depth, blocks, p.scale_row, p.out.stride(0), p.other_row, p.residual_row, p.factor, units, tiles, tile.together,
        p.parts, p.eps, p.normed, TOKENS=tile.tokens, UNIT=tile.unit, STAGES=stages_of(tile, units, p.halves, width),
        SCALES=power_of_2(tile.together * units * tile.unit), GATED=p.gated, PARTS=p.padded_parts, num_warps=4,
        **programmatic(p.x.device, "product"),
    )  # fmt: skip


def _box(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For TMA, `rows` × 128 bytes of a matrix; outside of it there are zeros."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
