"""`gemm.py --large`: block-FP8 products of many rows, TFLOP/s and share of the roofline, beside cuBLAS with block and with
tensor-wide scales."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from rates import here
from sweep import DEVICE, copies_for, error_of, line, precompile, rotate

from fluentllm.kernels.block_fp8 import linear_reference, quantise_weight
from fluentllm.kernels.fp8_library import library_product, library_scale
from fluentllm.kernels.triton.fp8_gemm import GemmTile, fp8_gemm
from fluentllm.kernels.triton.fp8_quantise import quantise_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

SHAPES = [
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (4096, 6144, 12288),
    (4096, 2112, 6144),
    (8192, 2048, 6144),
    (1000, 6144, 4096),
]
"""(tokens, rows, depth)."""
TILES = [
    GemmTile(128, 128, 8, 4),
    GemmTile(128, 128, 8, 3, registers=128),
    GemmTile(64, 128, 4, 3),
    GemmTile(64, 128, 4, 4),
    GemmTile(128, 64, 4, 4),
    GemmTile(128, 64, 8, 4),
    GemmTile(256, 64, 8, 4),
    GemmTile(256, 128, 8, 4),
]


def _one_scale(q: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return torch._scaled_mm(q, weight.t(), scale, scale, out_dtype=torch.bfloat16)


def _block_scales(q: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    padded = library_scale(weight, w_scale)
    assert padded is not None, "cuBLAS has no block scales here"
    return library_product(q, scale, weight, padded, torch.bfloat16)


def _attempt(run: Callable[[], Tensor]) -> tuple[float, Tensor] | None:
    try:
        return rotate([run]), run()
    except Exception as failure:
        print(f"  cuBLAS: {str(failure)[:140]}", flush=True)
        return None


def many_rows(shapes: Sequence[tuple[int, int, int]]) -> list[dict[str, object]]:
    meta = {"device": "meta"}
    q = torch.empty(512, 1024, dtype=torch.float8_e4m3fn, **meta)
    scales = torch.empty(8, 512, **meta), torch.empty(8, 8, **meta)
    weight = torch.empty(1024, 1024, dtype=torch.float8_e4m3fn, **meta)
    print(f"compiled {precompile([partial(fp8_gemm, q, scales[0], weight, scales[1], tile=tile) for tile in TILES])} kernels")
    here()
    widths = (7, 6, 6, 8, 8, 6, 10, 10, 8)
    print(line(("tokens", "rows", "depth", "us", "TFLOP/s", "share", "torch blk", "torch one", "error"), widths))
    rows = []
    for tokens, n, k in shapes:
        flops = 2 * tokens * n * k
        x = torch.randn(tokens, k, device=DEVICE).bfloat16()
        q, scale = quantise_rows(x)
        weights = [quantise_weight(torch.randn(n, k, device=DEVICE)) for _ in range(min(4, copies_for(n * k)))]
        expected = linear_reference(q[:256], scale[:, :256], *weights[0])
        found = []
        for tile in TILES:
            runs = [partial(fp8_gemm, q, scale, *pair, tile=tile) for pair in weights]
            try:
                error = error_of(runs[0]()[:256], expected)
                us = rotate(runs)
            except Exception as failure:
                print(f"  {tile} fails: {str(failure)[:160]}", flush=True)
                continue
            found.append((us, error, tile))
            print(f"    {tile}: {us:.1f} us, {flops / us / 1e6:.0f} TFLOP/s, error {error:.1e}", flush=True)
        if not found:
            continue
        us, error, tile = min(found, key=lambda one: one[0])
        share = here().share(us, tokens * k + n * k + 2 * tokens * n, fp8=flops)
        one = torch.ones((), device=DEVICE)
        block = _attempt(partial(_block_scales, q, scale, *weights[0]))
        whole = _attempt(partial(_one_scale, q, one, weights[0][0]))
        row = {"tokens": tokens, "rows": n, "depth": k, "us": us, "TFLOPs": flops / us / 1e6, "share": share, "error": error,
               "torch_block_us": block and block[0], "torch_tensor_us": whole and whole[0], "tile": asdict(tile)}  # fmt: skip
        rows.append(row)
        shown = (tokens, n, k, us, row["TFLOPs"], f"{share:.2f}", row["torch_block_us"], row["torch_tensor_us"], f"{error:.1e}")
        print(line(shown, widths), flush=True)
        if block:
            print(f"    torch with block scales: error {error_of(block[1][:256], expected):.1e}")
    return rows
