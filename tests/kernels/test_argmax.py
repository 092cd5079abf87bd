"""Argmax by groups against torch's."""

from __future__ import annotations

import pytest
import torch

from fluentllm.kernels.argmax import argmax_rows


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 96, 1000, 4096, 49152])
def test_argmax_is_torchs(rows: int, width: int) -> None:
    x = torch.randn(rows, width)
    assert torch.equal(argmax_rows(x), x.argmax(1))


def test_the_first_of_equals_wins() -> None:
    x = torch.zeros(3, 512)
    x[0, [70, 71, 400]] = 1.0
    x[1, [255, 256]] = 1.0
    assert argmax_rows(x).tolist() == [70, 255, 0]


def test_minus_infinity_and_no_finite_value() -> None:
    x = torch.full((2, 256), float("-inf"))
    x[1, 200] = -1e30
    assert argmax_rows(x).tolist() == [0, 200]
