"""Tokens in the order of their experts, one row a pair, in E4M3 with a scale for each 128 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..block_fp8 import BLOCK, E4M3, LARGEST, LEAST_SCALE
from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, programmatic

if TYPE_CHECKING:
    from torch import Tensor

    from .moe_sort import ExpertTiles

GROUPS = 8
"""Blocks of 128 columns of one program."""


@triton.jit(do_not_specialize=["scale_row"])
def _pack_kernel(out, scale, x, order, end, K, x_row, scale_row, largest, least, TOP_K: tl.constexpr, GROUPS: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    if place < tl.load(end):
        token = (tl.load(order + place) // TOP_K).to(tl.int64)
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        k = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + token * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        start_next(PDL, LOADED)
        s = tl.maximum(tl.max(tl.abs(value), 1) / largest, least)
        q = tl.minimum(tl.maximum(value / s[:, None], -largest), largest)
        tl.store(out + place * K + k, q.to(out.dtype.element_ty), mask=k < K)
        tl.store(scale + group * scale_row + place, s, mask=group * BLOCK < K)


def pack(x: Tensor, tiles: ExpertTiles, top_k: int) -> tuple[Tensor, Tensor]:
    """x [T, K], last dimension contiguous → E4M3 [T · top_k, K], row i being the token of pair `tiles.order[i]`, and scale
    float32 [⌈K / 128⌉, T · top_k]; what lies behind the last expert's pairs is not written.

    Reference: `block_fp8.quantise_rows_reference(x[order // top_k])`."""
    pairs, columns = tiles.order.shape[0], x.shape[1]
    blocks = -(-columns // BLOCK)
    out = torch.empty(pairs, columns, dtype=E4M3, device=x.device)
    scale = torch.empty(blocks, pairs, dtype=torch.float32, device=x.device)
    launch(
        _pack_kernel, (pairs, -(-blocks // GROUPS)), out, scale, x, tiles.order, tiles.offsets[-1:], columns, x.stride(0),
        scale.stride(0), LARGEST, LEAST_SCALE, TOP_K=top_k, GROUPS=GROUPS, BLOCK=BLOCK, num_warps=4, **programmatic(x.device),
    )  # fmt: skip
    return out, scale
