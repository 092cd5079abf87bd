"""The FP8 cache and MLA decode in plain torch: what the kernels are measured against."""

from __future__ import annotations

import math

import pytest
import torch
from mla_decode_cases import SCALE, cosine_deficit, fresh_generator, random_case, relative_error

from fluentllm.kernels.mla_decode import PAGE_BYTES, fp8_planes, new_fp8_pool
from fluentllm.kernels.mla_decode.plan import new_plan
from fluentllm.kernels.mla_decode.reference import (
    append_reference,
    decode_reference,
    fetch_reference,
    quantise_reference,
)
from fluentllm.kernels.mla_decode.replay import combine_reference, decode_pieces


def test_a_page_is_three_planes_of_its_bytes() -> None:
    pool = new_fp8_pool(3, "cpu")
    planes = fp8_planes(pool)
    assert pool.shape == (3, 64 * 644)
    assert PAGE_BYTES % 16 == 0
    planes.latent[1, 5, 7] = 2.0
    planes.scale[1, 63] = 0.25
    planes.rope[1, 0, 0] = -3.0
    assert pool[1, 5 * 512 + 7] == torch.tensor(2.0).to(torch.float8_e4m3fn).view(torch.uint8)
    assert pool[1, 32768 + 63 * 4 : 33024].view(torch.float32) == 0.25
    assert pool[1, 33024:33026].view(torch.bfloat16) == -3.0
    assert (pool != 0).sum() == 5
    assert pool[[0, 2]].count_nonzero() == 0


def test_a_layer_of_a_larger_pool_is_a_view_too() -> None:
    pool = torch.zeros(2, 5, 64, 644, dtype=torch.uint8)
    fp8_planes(pool[1]).scale.fill_(1.0)
    assert pool[0].count_nonzero() == 0
    assert pool[1].count_nonzero() == 5 * 64 * 2


@pytest.mark.parametrize("pool", [torch.zeros(2, 64 * 644), torch.zeros(2, 64, 640, dtype=torch.uint8)])
def test_other_pools_are_refused(pool: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        fp8_planes(pool)


def test_scales_are_powers_of_two_and_restore_the_rotary_part_exactly() -> None:
    generator = fresh_generator()
    latent = torch.randn(200, 512, generator=generator) * torch.logspace(-6, 6, 200)[:, None]
    rope = (torch.randn(200, 64, generator=generator) * 300).bfloat16()
    content, aligned, scale = quantise_reference(latent, rope)
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    assert torch.equal(aligned.float() * scale[:, None], rope.float())
    assert relative_error(content.float() * scale[:, None], latent) < 0.04
    # Nothing saturates, and no smaller scale would do.
    assert (latent.abs().amax(1) <= 448 * scale).all()
    limited = (latent.abs().amax(1) / 448 < scale / 2) & (rope.float().abs().amax(1) / 2**30 < scale / 2)
    assert not limited.any()


def test_any_finite_input_stays_finite() -> None:
    extremes = torch.tensor([0.0, 1e-38, 1e-20, 1.0, 448.0, 6e4, 1e20, 3e38, -3e38])
    for latent in extremes:
        for rope in extremes:
            content, aligned, scale = quantise_reference(latent.expand(1, 512), rope.expand(1, 64))
            assert content.float().isfinite().all()
            assert aligned.isfinite().all()
            assert 2.0**-40 <= scale <= 2.0**30


def test_appended_tokens_come_back() -> None:
    generator = fresh_generator()
    planes = fp8_planes(new_fp8_pool(4, "cpu"))
    latent, rope = torch.randn(50, 512, generator=generator) * 3, torch.randn(50, 64, generator=generator).bfloat16()
    rows = torch.randperm(256, generator=generator)[:50]
    append_reference(planes, latent, rope, rows)
    restored, turned = fetch_reference(planes, rows)
    assert relative_error(restored, latent) < 0.04
    assert torch.equal(turned, rope.float())


def test_the_reference_is_causal_attention() -> None:
    case = random_case([70, 3, 0], heads=4, query_length=3, generator=fresh_generator())
    out = decode_reference(case.q_latent, case.q_rope, case.bf16, case.table, case.lengths, SCALE, dtype=torch.float64)
    assert out[2].count_nonzero() == 0
    for i, length in enumerate([70, 3]):
        rows = (case.table[i].long()[:, None] * 64 + torch.arange(64)).flatten()[:length]
        keys = case.bf16.view(-1, 576)[rows].double()
        query = torch.cat([case.q_latent[i], case.q_rope[i]], -1).double().transpose(0, 1)
        mask = torch.ones(3, length, dtype=torch.bool).tril(length - 3)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, keys.expand(4, -1, -1), keys[:, :512].expand(4, -1, -1), attn_mask=mask, scale=SCALE
        )
        assert relative_error(out[i], expected.transpose(0, 1)) < 1e-12


@pytest.mark.parametrize("deviation", [0.3, 3.0, 8.0])
def test_the_kernels_arithmetic_loses_no_more_than_the_quantisation(deviation: float) -> None:
    case = random_case([700, 64, 0, 131], 8, 2, generator=fresh_generator(), deviation=deviation, rope=1000.0)
    exact, emulated = case.exact(), case.emulated()
    content, aligned, scale = quantise_reference(case.q_latent, case.q_rope)
    for parts in (2, 7, 40):
        plan = new_plan(case.lengths, parts)
        out, partial, lse = decode_pieces(plan, content, aligned, scale, case.planes, case.table, SCALE)
        combine_reference(plan, out, partial, lse)
        out = out.view_as(exact)
        assert relative_error(out, emulated) < 2e-3
        assert cosine_deficit(out, exact) <= 1.2 * cosine_deficit(emulated, exact)
    assert not math.isnan(relative_error(out, exact))
