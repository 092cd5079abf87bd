"""What stands around MLA's products, in one launch each, against the layer's own steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kernel_kv_append import rope_tables

from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.mla_rows import append_and_rotate, append_latents, rotate_queries
from fluentllm.kernels.triton.moe_scores import router_logits


@pytest.mark.parametrize(("before", "kv", "rope"), [(96, 64, 16), (0, 512, 64), (24, 40, 8)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_latents_and_rows(
    before: int, kv: int, rope: int, interleaved: bool, tokens: int, device: torch.device, rng: torch.Generator
) -> None:
    """`before`: columns of the same product that are another's."""
    ops = PlainOps()
    cos, sin = (t[:tokens] for t in rope_tables(9, rope, interleaved, rng))
    down = torch.randn(tokens, before + kv + rope, generator=rng)
    kv_weight = torch.rand(kv, generator=rng) + 0.5
    rows = torch.randperm(20, generator=rng)[:tokens]
    latent, key = down[:, before:].split([kv, rope], 1)
    expected = torch.zeros(20, kv + rope)
    rotated = ops.rotary(key.unsqueeze(1), cos, sin, interleaved=interleaved).squeeze(1)
    expected.index_copy_(0, rows, torch.cat((ops.rms_norm(latent, kv_weight, 1e-6) * 1.7, rotated), 1))

    cache = torch.zeros(20, kv + rope, device=device)
    append_latents(
        down.to(device)[:, before:], kv_weight.to(device), cos.to(device), sin.to(device), rows.to(device), cache, eps=1e-6,
        latent_scale=1.7, interleaved=interleaved,
    )  # fmt: skip
    torch.testing.assert_close(cache.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (1, 3), (5, 40), (9, 16)])
def test_latents_and_queries_in_one_launch(
    interleaved: bool, tokens: int, heads: int, device: torch.device, rng: torch.Generator
) -> None:
    cos, sin = (t[:tokens].to(device) for t in rope_tables(9, 64, interleaved, rng))
    down = torch.randn(tokens, 24 + 512 + 64, generator=rng).to(device)[:, 24:]
    kv_weight = (torch.rand(512, generator=rng) + 0.5).to(device)
    q = torch.randn(tokens, heads, 96, generator=rng).to(device)[..., 32:]
    rows = torch.randperm(20, generator=rng)[:tokens].to(device)
    apart, together = torch.zeros(20, 576, device=device), torch.zeros(20, 576, device=device)
    beside = torch.empty(tokens, heads, 64, device=device)
    options = {"eps": 1e-6, "latent_scale": 1.7, "interleaved": interleaved}
    append_latents(down, kv_weight, cos, sin, rows, apart, **options)
    rotate_queries(q, cos, sin, beside, interleaved=interleaved)
    rotated = append_and_rotate(q, down, kv_weight, cos, sin, rows, together, **options)
    assert torch.equal(rotated, beside)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (1, 3), (5, 40)])
def test_queries_in_place_and_beside(
    interleaved: bool, tokens: int, heads: int, device: torch.device, rng: torch.Generator
) -> None:
    cos, sin = (t[:tokens] for t in rope_tables(9, 64, interleaved, rng))
    q = torch.randn(tokens, heads, 96, generator=rng)
    expected = PlainOps().rotary(q[..., 32:], cos, sin, interleaved=interleaved)
    ours, beside = q.to(device, copy=True), torch.empty(tokens, heads, 64, device=device)
    rotate_queries(ours[..., 32:], cos.to(device), sin.to(device), beside, interleaved=interleaved)
    torch.testing.assert_close(beside.cpu(), expected, rtol=1e-5, atol=1e-5)
    rotate_queries(ours[..., 32:], cos.to(device), sin.to(device), ours[..., 32:], interleaved=interleaved)
    torch.testing.assert_close(ours.cpu(), torch.cat((q[..., :32], expected), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "hidden", "total"), [(0, 64, 8), (1, 96, 12), (7, 520, 24)])
def test_router_logits(tokens: int, hidden: int, total: int, device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(tokens, hidden, generator=rng).to(torch.bfloat16)
    weight = torch.randn(total, hidden, generator=rng)
    logits = router_logits(x.to(device), weight.to(device)).cpu()
    torch.testing.assert_close(logits, F.linear(x.double(), weight.double()).float(), rtol=1e-4, atol=1e-3)
