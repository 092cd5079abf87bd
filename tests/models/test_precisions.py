"""The measure of the GPU's logits, on any machine: every family in float64, and how far narrower dtypes are off on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.families import FAMILIES, Family, errors, float64_weights

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("name", FAMILIES)
def test_each_dtype_is_off_by_its_own_rounding(name: str, tmp_path: Path) -> None:
    """Of most rows: where experts are chosen, rounding now and then chooses others. Errors of a few layers and of sums of some
    hundred products are a few roundings for BF16, whose sums are float32, and some tens where sums are rounded too."""
    with float64_weights():
        family = Family(name, tmp_path)
        exact = family.logits(CPU, torch.float64)
        for dtype, roundings in ((torch.float32, 64), (torch.bfloat16, 8)):
            off = errors(family.logits(CPU, dtype), exact).quantile(0.8).item()
            assert off < roundings * torch.finfo(dtype).eps / 2, dtype


@pytest.mark.parametrize("name", FAMILIES)
def test_an_fp8_cache_costs_what_its_three_bits_of_mantissa_do(name: str, tmp_path: Path) -> None:
    """Keys and values are rounded once, each by its own error, which sums of many make smaller."""
    with float64_weights():
        family = Family(name, tmp_path)
        exact = family.logits(CPU, torch.float64)
        wide, narrow = (family.bf16_errors(exact, dtype).quantile(0.8).item() for dtype in (torch.bfloat16, FP8))
        assert 0.9 * wide < narrow < torch.finfo(FP8).eps / 2
