"""MLA's decode of few tokens: what stands before attention in one launch, against the layer's own steps."""

from __future__ import annotations

import pytest
import torch
from test_kernel_kv_append import rope_tables
from torch import Tensor

from fluentllm.kernels.mla_decode import fp8_planes
from fluentllm.kernels.mla_decode.append import absorb_norms, append_norms
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton import mla_absorb
from fluentllm.kernels.triton.mla_absorb import absorb, absorbs

BF16_STEP = 2.0**-7
"""Of a value that is rounded once, or, in the interpreter, cut off."""


class Case:
    """Of one layer: queries, what the down projection gave (its columns strided), matrices."""

    def __init__(
        self, tokens: int, heads: int, nope: int, width: int, rope: int, interleaved: bool, dtype: torch.dtype,
        rng: torch.Generator,
    ) -> None:  # fmt: skip
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(dtype)

        self.nope, self.width, self.interleaved = nope, width, interleaved
        self.q, self.up_k = random(tokens, heads, nope + rope), random(heads, nope, width) * 0.2
        self.down, self.weight = random(tokens, 48 + width + rope) * 3, random(width) * 0.2 + 1
        self.cos, self.sin = (t[:tokens].to(dtype) for t in rope_tables(99, rope, interleaved, rng))
        self.rows = torch.randperm(128, generator=rng)[:tokens]

    def given(self, device: torch.device) -> tuple[Tensor, ...]:
        kv = self.down.to(device)[:, 48:]
        rest = (self.weight, self.cos, self.sin, self.rows)
        return (self.q.to(device), self.up_k.to(device), kv, *(t.to(device) for t in rest))

    def expected(self, latent_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """In float64: absorbed queries, rotated ones, the cache [128, width + rope]."""
        ops = PlainOps()
        q, up_k, kv, weight, cos, sin = (
            t.double() for t in (self.q, self.up_k, self.down[:, 48:], self.weight, self.cos, self.sin)
        )
        absorbed = torch.einsum("thn,hnc->thc", q[..., : self.nope], up_k)
        rotated = ops.rotary(q[..., self.nope :], cos, sin, interleaved=self.interleaved)
        latent, key = kv[:, : self.width], kv[:, self.width :]
        latent = latent * (latent.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight * latent_scale
        key = ops.rotary(key.unsqueeze(1), cos, sin, interleaved=self.interleaved).squeeze(1)
        cache = torch.zeros(128, kv.shape[1], dtype=torch.float64)
        return absorbed, rotated, cache.index_copy_(0, self.rows, torch.cat((latent, key), 1))


@pytest.mark.parametrize(
    ("tokens", "heads", "nope", "width", "rope"),
    [
        (0, 4, 16, 64, 16),
        (1, 4, 128, 512, 64),
        (5, 20, 24, 96, 8),
        (9, 16, 32, 80, 64),
        (66, 1, 16, 40, 16),
        (2, 64, 16, 64, 8),
    ],
)
def test_absorb(tokens: int, heads: int, nope: int, width: int, rope: int, device: torch.device, rng: torch.Generator) -> None:
    interleaved = bool(torch.randint(2, (1,), generator=rng))
    print(f"interleaved {interleaved}")
    # Sums of up to 128 products of both signs, of 0.13 in the mean: float32 loses about 1e-6 of them whatever they come to.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, BF16_STEP))[: 1 if tokens > 64 else 2]:
        case = Case(tokens, heads, nope, width, rope, interleaved, dtype, rng)
        cache = torch.zeros(128, width + rope, dtype=dtype, device=device)
        absorbed, rotated = absorb(*case.given(device), cache, eps=1e-6, latent_scale=1.75, interleaved=interleaved)
        expected, turned, written = case.expected(1.75)
        torch.testing.assert_close(absorbed.cpu().double(), expected, rtol=tolerance, atol=1e-4)
        torch.testing.assert_close(rotated.cpu().double(), turned, rtol=tolerance, atol=1e-4)
        # The norm is rounded before it is scaled, and again after.
        torch.testing.assert_close(cache.cpu().double(), written, rtol=2.1 * tolerance, atol=1e-4)


@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (1, 16), (5, 20), (17, 3)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_absorb_over_an_fp8_cache(
    tokens: int, heads: int, interleaved: bool, device: torch.device, rng: torch.Generator
) -> None:
    """The cache gets the same bytes as in a launch of its own, which has its own test."""
    case = Case(tokens, heads, 32, 512, 64, interleaved, torch.float32, rng)
    q, up_k, *rest = case.given(device)
    pools = [torch.zeros(2, 64, 644, dtype=torch.uint8, device=device) for _ in range(2)]
    named = {"eps": 1e-6, "latent_scale": 2.4, "interleaved": interleaved}
    absorbed = absorb_norms(q, up_k, *rest, fp8_planes(pools[0]), **named)
    append_norms(*rest, fp8_planes(pools[1]), **named)
    torch.testing.assert_close(absorbed.cpu().double(), case.expected(1.0)[0], rtol=1e-5, atol=1e-4)
    # Compiled, two kernels may add a row's squares up in another order: a value at the edge of two E4M3 steps goes either way.
    assert int((pools[0] != pools[1]).sum()) <= (0 if device.type == "cpu" else 8)
    assert bool(pools[0].count_nonzero()) == bool(tokens)


def test_which_passes_are_done_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert absorbs(1, 1)
    assert absorbs(mla_absorb.MOST_TOKENS, 8)
    assert not absorbs(mla_absorb.MOST_TOKENS + 1, 1)
    assert not absorbs(1, None), "prefill"
    monkeypatch.setattr(mla_absorb, "MOST_TOKENS", 0)
    assert not absorbs(1, 1)
