"""MLA decode over the FP8 cache for more than 64 query rows, by clusters of two CTAs: `mla_decode_cluster.cu`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..mla_decode.layout import LATENT, PAGE, ROPE
from ..triton.launch import launch
from .compile import compiler_version
from .launch import FLOAT, INT, LONG, MAP, POINTER, Boxes, CudaKernel

if TYPE_CHECKING:
    from torch import Tensor

    from ..mla_decode.layout import Fp8Planes
    from ..mla_decode.plan import DecodePlan

ROW_TILE, PANEL, THREADS = 64, 128, 512
"""As in `mla_memory.cuh` and `mla_decode_cluster.cu`."""
SHARED_BYTES = 232_144
"""Of a CTA: `SHARED_BYTES` in `mla_memory.cuh`."""

mla_decode_cluster = CudaKernel("mla_decode_cluster", (*[MAP] * 4, *[POINTER] * 9, LONG, FLOAT, *[INT] * 6))


def takes(rows: int) -> bool:
    """Can clusters have a sequence of `rows` query rows, each as many as it can hold?"""
    groups = -(-rows // ROW_TILE)
    return rows > ROW_TILE and groups % 2 == 0 and compiler_version() is not None


def decode_by_clusters(
    plan: DecodePlan,
    heads: int,
    rows: int,
    q_latent: Tensor,
    q_rope: Tensor,
    q_scale: Tensor,
    cache: Fp8Planes,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    *,
    early: bool,
    following: bool,
    latent_first: bool,
) -> None:
    """As `decode.MlaDecode.fp8` without what comes behind it: outputs of whole sequences to `out`, of others' pieces to
    `partial` and `lse`. rows: of a sequence, query length times heads. early: set up while the kernel in front runs; following:
    let the next one be, too; latent_first: the order of the scores' products (`switches.LATENT_FIRST`)."""
    groups = -(-rows // ROW_TILE)
    launch(
        mla_decode_cluster, (plan.parts * groups,), Boxes(q_latent.view(-1, LATENT), (ROW_TILE, PANEL)),
        Boxes(cache.latent, (1, PAGE, PANEL)), Boxes(cache.rope, (1, PAGE // 2, ROPE)),
        Boxes(cache.scale, (1, PAGE // 2), swizzled=False), q_rope, q_scale, out, partial, lse, page_table, plan.lengths,
        plan.starts, plan.records, page_table.stride(0), scale * math.log2(math.e), heads, rows, groups,
        out.dtype == torch.float32, early, following, LATENT_FIRST=latent_first, threads=THREADS, shared=SHARED_BYTES,
        launch_pdl=early,
    )  # fmt: skip
