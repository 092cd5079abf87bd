"""cuBLAS's product of block FP8 on a GPU, beside the definition and our own kernel."""

from __future__ import annotations

import pytest
import torch

from fluentllm.kernels.block_fp8 import linear_reference, quantise_weight
from fluentllm.kernels.fp8_library import ROWS, library_product, library_products, library_scale
from fluentllm.kernels.triton.fp8_gemm import fp8_gemm
from fluentllm.kernels.triton.fp8_quantise import quantise_rows

pytestmark = pytest.mark.gpu(capability=(9, 0))
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "rows", "depth"), [(1, 128, 128), (65, 2112, 6144), (130, 2048, 2816), (333, 208, 10944), (0, 64, 256)]
)
def test_product(tokens: int, rows: int, depth: int, dtype: torch.dtype) -> None:
    if not library_products(DEVICE):
        pytest.skip("cuBLAS has block scales from CUDA 12.9 on")
    torch.manual_seed(tokens)
    x = torch.randn(tokens, depth, device=DEVICE).bfloat16()
    weight, scale = quantise_weight(
        torch.randn(rows, depth, device=DEVICE) * torch.linspace(0.1, 9, rows, device=DEVICE)[:, None]
    )
    padded = library_scale(weight, scale)
    assert padded is not None
    q, x_scale = quantise_rows(x, ROWS)
    assert q.shape[0] % ROWS == 0
    out = library_product(q, x_scale, weight, padded, dtype)[:tokens]
    plain_q, plain_scale = quantise_rows(x)
    expected = linear_reference(plain_q, plain_scale, weight, scale)
    assert out.dtype is dtype
    assert (out.float() - expected).norm() <= 3e-3 * expected.norm()
    ours = fp8_gemm(plain_q, plain_scale, weight, scale, out_dtype=torch.float32)
    assert (ours - expected).norm() <= 3e-3 * expected.norm()


def test_a_weight_it_cannot_multiply_by() -> None:
    weight, scale = quantise_weight(torch.randn(24, 128, device=DEVICE))
    assert library_scale(weight, scale) is None
