"""Keys that a draft layer does not have: decode and prefill attention from `first_key` on."""

from __future__ import annotations

import pytest
import torch
from paged import random_paged

from fluentllm.kernels.attention_reference import gqa_reference
from fluentllm.kernels.triton.gqa_decode import gqa_decode
from fluentllm.kernels.triton.gqa_plan import plan_gqa
from fluentllm.kernels.triton.gqa_prefill import gqa_prefill
from fluentllm.kernels.triton.gqa_prefill_plan import PrefillPlan


@pytest.mark.parametrize("lengths", [[2], [3, 70, 300]])
def test_decode(lengths: list[int], device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged(lengths, rng, device, kv_heads=1, dim=64)
    q = torch.randn(len(lengths), 2, 64, generator=rng).to(device)
    plan = plan_gqa(paged.lengths, kv_heads=1, longest=512)
    out = gqa_decode(q, paged.k, paged.v, paged.table, paged.lengths, plan, 1, 0.125, first_key=1)
    for i, length in enumerate(lengths):
        k, v = paged.keys(i)
        expected = gqa_reference(q[i : i + 1].double(), k[1:], v[1:], torch.tensor([length - 2]), 0.125)
        torch.testing.assert_close(out[i : i + 1].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("cached", "rows"), [(0, 130), (70, 3)])
def test_prefill(cached: int, rows: int, device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([cached + rows], rng, device, kv_heads=1, dim=64)
    q = torch.randn(rows, 2, 64, generator=rng).to(device)
    plan = PrefillPlan([rows], [cached + rows], device, rows=64)
    out = gqa_prefill(q, paged.k, paged.v, paged.table, plan, 0.125, first_key=1)
    assert out.isfinite().all(), "a row that sees no key"
    k, v = paged.keys(0)
    seen = slice(0 if cached else 1, None)
    positions = torch.arange(cached, cached + rows)[seen] - 1
    expected = gqa_reference(q[seen].double(), k[1:], v[1:], positions, 0.125)
    torch.testing.assert_close(out[seen].double(), expected, rtol=0, atol=2e-6)
