"""Packed matrices against the plain product: every precision, ragged numbers of rows, blocks as checkpoints have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluentllm.kernels import weights
from fluentllm.kernels.block_fp8 import dequantise_rows, quantise_rows_reference
from fluentllm.kernels.copies import COPIES
from fluentllm.kernels.quantise import dequantise_blocks, quantise_int4, quantise_int8
from fluentllm.kernels.split_int8 import SplitInt8Weight, has_vnni

ROWS = (0, 1, 2, 3, 9, 40)
ERROR = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "packed": 2e-3, "int8": 2e-2, "int4": 0.15, "fp8": 0.12}
"""max|Δ| / max|ref| of a product with normal weights, what the precision itself loses included."""


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max()) if expected.numel() else 0.0


@pytest.mark.parametrize("precision", weights.PRECISIONS)
@pytest.mark.parametrize("shape", [(48, 64), (80, 96), (33, 40), (7, 24)])
def test_products_are_the_plain_ones(precision: str, shape: tuple[int, int]) -> None:
    matrix, bias = torch.randn(shape), torch.randn(shape[0])
    packed = weights.pack(matrix, precision)
    assert (packed.out_features, packed.in_features) == shape
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        assert error(packed.product(x, bias), x @ matrix.T + bias) <= ERROR[precision]
        if precision == "fp8":  # activations are quantised too
            x = dequantise_rows(*quantise_rows_reference(x))
        assert error(packed.product(x, None), x @ packed.dequantised().T) <= min(2e-2, ERROR[precision])


@pytest.mark.parametrize("precision", weights.PRECISIONS)
def test_bfloat16_activations_stay_bfloat16(precision: str) -> None:
    matrix, x = torch.randn(48, 64), torch.randn(5, 64, dtype=torch.bfloat16)
    found = weights.pack(matrix, precision).product(x, None)
    assert found.dtype is torch.bfloat16
    assert error(found.float(), x.float() @ matrix.T) <= ERROR[precision] + 1e-2


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        weights.pack(torch.randn(16, 32), "int3")


@pytest.mark.parametrize("shape", [(48, 64), (20, 96)])
@pytest.mark.parametrize("precision", ["packed", "int4"])
def test_blocks_of_four_bits_are_taken_as_they_are(shape: tuple[int, int], precision: str) -> None:
    parts = {"q": torch.randint(0, 16, shape, dtype=torch.uint8)}
    parts |= {name: torch.randn(shape[0], shape[1] // 32) for name in ("d", "m")}
    exact = dequantise_blocks("q4_1", parts)
    packed = weights.pack_blocks("q4_1", parts, precision, twice=True)
    if shape[0] % 16:
        assert packed is None
        return
    assert packed is not None
    # The 4 bits are kept. Each of d, m + 8 d, (q - 8) d and the sum is rounded to bfloat16: by 2^-8 of itself at most.
    d, m = (parts[name].repeat_interleave(32, dim=1) for name in ("d", "m"))
    bound = 2.0**-8 * (2 * 8 * d.abs() + (m + 8 * d).abs() + exact.abs()) * 1.02
    assert ((packed.dequantised() - exact).abs() <= bound).all()
    COPIES.wait()
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        assert error(packed.product(x, None), x @ exact.T) <= 2e-2


def test_blocks_are_left_to_the_caller_where_there_is_no_place_for_them() -> None:
    parts = {"q": torch.zeros(16, 32, dtype=torch.uint8), "d": torch.zeros(16, 1), "m": torch.zeros(16, 1)}
    for precision in ("float32", "bfloat16", "float16", "int8"):
        assert weights.pack_blocks("q4_1", parts, precision) is None


def test_blocks_spell_their_values_out() -> None:
    q = torch.tensor([[0, 15] * 16], dtype=torch.uint8)
    values = dequantise_blocks("q4_1", {"q": q, "d": torch.tensor([[2.0]]), "m": torch.tensor([[-1.0]])})
    assert values[0, :2].tolist() == [-1.0, 29.0]
    with pytest.raises(ValueError, match="q2_k"):
        dequantise_blocks("q2_k", {"q": q, "d": torch.ones(1, 1)})


def test_rounding_errs_by_half_a_step_at_most() -> None:
    matrix = torch.randn(32, 96) * torch.logspace(-3, 3, 32).unsqueeze(1)
    q, scale = quantise_int8(matrix)
    assert ((q.float() * scale.unsqueeze(1) - matrix).abs() <= 0.51 * scale.unsqueeze(1) + matrix.abs() * 0.01).all()
    q4, scale4, zero = quantise_int4(matrix)
    values = (q4.float() - 8).unflatten(1, (-1, 32)) * scale4.unsqueeze(-1) + zero.unsqueeze(-1)
    step = scale4.repeat_interleave(32, 1)
    assert ((values.flatten(1) - matrix).abs() <= step).all()


@pytest.mark.skipif(not has_vnni(), reason="this CPU has no VNNI")
@pytest.mark.parametrize("rows", ROWS)
def test_split_activations_have_sixteen_bits(rows: int) -> None:
    """Each row on its own scale: an enormous row beside it, or an enormous value in it, costs the others nothing."""
    q, scale = quantise_int8(torch.randn(48, 96))
    x = torch.randn(rows, 96) * torch.logspace(-6, 6, max(rows, 1)).unsqueeze(1)[:rows]
    if rows > 2:
        x[1] = 0
        x[2, 5] = 1e4
    expected = x @ (q.float() * scale.unsqueeze(1)).T
    found = SplitInt8Weight(q, scale).product(x, None)
    largest = x.abs().amax(1, keepdim=True)
    assert torch.all((found - expected).abs() <= largest * 2e-3)


def test_copies_count_their_bytes() -> None:
    packed = weights.pack(torch.randn(64, 64), "int4", twice=True)
    alone = weights.pack(torch.randn(64, 64), "int4")
    assert packed.nbytes == alone.nbytes + weights.copy_bytes(packed)
    assert weights.copy_bytes(alone) == 0
