"""Random MLA decode cases, shared by the tests of the CPU and of the GPU."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fluentllm.kernels.mla_decode import Fp8Planes, fp8_planes, new_fp8_pool
from fluentllm.kernels.mla_decode.reference import append_reference, decode_reference, quantised_query

SCALE = 192**-0.5


def fresh_generator(device: str = "cpu") -> torch.Generator:
    """A new seed in every run; printed, so that a failing test tells it."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator(device).manual_seed(seed)


@dataclass
class Case:
    """N sequences in scattered pages of both caches. What nothing of them was written to holds tokens of others that were there
    before, large ones: also the rest of a last page."""

    q_latent: Tensor
    q_rope: Tensor
    lengths: Tensor
    table: Tensor
    bf16: Tensor
    pool: Tensor

    @property
    def planes(self) -> Fp8Planes:
        return fp8_planes(self.pool)

    def exact(self) -> Tensor:
        """Float64, on what was never quantised."""
        q_latent, q_rope = self.q_latent.double(), self.q_rope.double()
        return decode_reference(q_latent, q_rope, self.bf16, self.table, self.lengths, SCALE, dtype=torch.float64)

    def emulated(self) -> Tensor:
        """Float64, on the quantised cache and queries."""
        q_latent, q_rope = quantised_query(self.q_latent, self.q_rope)
        return decode_reference(q_latent, q_rope, self.planes, self.table, self.lengths, SCALE, dtype=torch.float64)


def random_case(
    lengths: list[int],
    heads: int,
    query_length: int = 1,
    *,
    generator: torch.Generator,
    deviation: float = 1.0,
    latent: float = 10.0,
    rope: float = 100.0,
) -> Case:
    """Latents up to about `latent`, rotary values up to about `rope`, logits of standard deviation `deviation`."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    counts = [-(-length // 64) for length in lengths]
    pages = sum(counts) + 2
    order = torch.randperm(pages - 1, generator=generator, device=device).int() + 1
    table = torch.zeros(len(lengths), max(1, *counts), dtype=torch.int32, device=device)
    bf16 = torch.zeros(pages, 64, 576, dtype=torch.bfloat16, device=device)
    pool = new_fp8_pool(pages, device)
    stale = (normal(pages * 64, 576) * 1000).bfloat16()
    bf16.view(-1, 576).copy_(stale)
    append_reference(fp8_planes(pool), stale[:, :512], stale[:, 512:], torch.arange(pages * 64, device=device))
    used = 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[i, :count] = order[used : used + count]
        used += count
        if length:
            rows = table[i, :count].long()[:, None] * 64 + torch.arange(64, device=device)
            rows = rows.flatten()[:length]
            content, turned = (normal(length, 512) * (latent / 3)).bfloat16(), (normal(length, 64) * (rope / 3)).bfloat16()
            bf16.view(-1, 576)[rows] = torch.cat([content, turned], 1)
            append_reference(fp8_planes(pool), content, turned, rows)
    shape = (len(lengths), query_length, heads)
    q_latent = normal(*shape, 512) * (deviation / SCALE / math.sqrt(2 * 512) / (latent / 3))
    q_rope = normal(*shape, 64) * (deviation / SCALE / math.sqrt(2 * 64) / (rope / 3))
    return Case(
        q_latent.bfloat16(), q_rope.bfloat16(), torch.tensor(lengths, dtype=torch.int32, device=device), table, bf16, pool
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN stays NaN."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def cosine_deficit(actual: Tensor, expected: Tensor) -> float:
    return 1.0 - float(torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0))
