"""Logits of every model family by every attention backend and over every cache, against the same weights on the CPU in float64.

How far BF16 may be off is measured: the same model in BF16 on the CPU, over such a cache, is the measure, and a GPU may be off
twice as far. Where experts are chosen, rounding now and then chooses others, on a CPU as on a GPU; so rows are compared by
quantiles, and each family's smallest error is far below what a wrong row would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from models.families import FAMILIES, Family, errors, float64_weights
from torch import Tensor

from fluentllm.assembly.attention.passes import Order, phased
from fluentllm.core.batch import Batch
from fluentllm.core.protocols import PHASES, AttentionBackend, AttentionContext
from fluentllm.core.settings import Settings, SpeculativeSettings

FP8 = torch.float8_e4m3fn
CACHES = {"bf16": torch.bfloat16, "fp8": FP8}
GPU = torch.device("cuda", 0)


@dataclass
class Measured:
    family: Family
    exact: Tensor
    _allowed: dict[tuple[torch.dtype, bool], Tensor] = field(default_factory=dict)

    def check(self, name: str, found: Tensor, kv_dtype: torch.dtype, *, deterministic: bool = False) -> None:
        # Deterministic mode reads a pass's own rows out of the FP8 cache too, and is further off for it.
        key = kv_dtype, deterministic and kv_dtype is FP8
        if key not in self._allowed:
            self._allowed[key] = self.family.bf16_errors(self.exact, kv_dtype, deterministic=key[1])
        off, measure = errors(found, self.exact), self._allowed[key]
        print(f"{name}: off by {off.median():.2e}, most {off.max():.2e}; CPU {measure.median():.2e}, {measure.max():.2e}")
        for share in (0.1, 0.5, 0.9):
            ours, allowed = off.quantile(share).item(), 2 * measure.quantile(share).item()
            assert ours <= allowed, f"the {share} quantile of the rows' errors is {ours:.2e}; BF16 explains {allowed:.2e}"
        assert off.max() <= max(2 * measure.max().item(), 0.5), f"a row is wrong: {off.max():.2e}"


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    with float64_weights():
        family = Family(request.param, tmp_path_factory.mktemp(request.param))
        yield Measured(family, family.logits(torch.device("cpu"), torch.float64))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["plain", "deterministic"])
def test_logits_are_the_float64_ones_as_far_as_bf16_goes(measured: Measured, deterministic: bool, cache: str) -> None:
    family, kv_dtype = measured.family, CACHES[cache]
    spec = family.asks("cuda", kv_dtype, deterministic=deterministic)
    # FlashInfer's kernels may not be compiled yet: it has a test of its own.
    entries = [entry for entry in family.backends.supported(spec) if entry.name != "flashinfer"]
    wanted = "mla_fp8" if cache == "fp8" and family.spec.kv.kind == "mla" else "triton"
    assert wanted in {entry.name for entry in entries}, family.backends.why_not(spec)
    for entry in entries:
        found = family.logits(GPU, torch.bfloat16, entry.factory, deterministic=deterministic, kv_dtype=kv_dtype)
        measured.check(entry.name, found, kv_dtype, deterministic=deterministic)


class Noted(Order):
    """Notes who is given passes."""

    def __init__(self, *backends: AttentionBackend) -> None:
        super().__init__(backends, named=True)
        self.given: list[AttentionBackend] = []

    def pick(self, batch: Batch) -> AttentionBackend:
        self.given.append(super().pick(batch))
        return self.given[-1]


def test_logits_by_flashinfer(measured: Measured) -> None:
    """As an engine has it: what FlashInfer has no kernel for, MLA's decode, goes to Triton's backend over the same cache."""
    family = measured.family
    phases = PHASES if family.spec.kv.kind == "gqa" else ("prefill",)
    spec = family.asks("cuda", torch.bfloat16, phases=phases)
    if (reason := family.backends.why_not(spec).get("flashinfer")) is not None:
        pytest.skip(reason)
    orders: list[Noted] = []
    made: list[AttentionBackend] = []

    def create(context: AttentionContext) -> AttentionBackend:
        drafts = Settings(speculative=SpeculativeSettings(method="pld", k=3))  # verification has four rows
        first = family.backends.get("flashinfer").factory(replace(context, spec=spec, settings=drafts))
        first.load()
        rest = family.backends.get("triton").factory(context)
        made.append(first)
        orders.extend((Noted(first, rest), Noted(first, rest)))
        return phased(*orders)

    found = family.logits(GPU, torch.bfloat16, create)
    for phase, order in zip(("prefill", "decode"), orders, strict=True):
        assert order.given
        if phase in phases and any(backend is not made[0] for backend in order.given):
            trouble = getattr(made[0], "_modules").trouble  # noqa: B009  (another backend's attribute)
            pytest.skip(f"FlashInfer's modules for {phase} are not compiled: {trouble or 'being compiled'}")
    measured.check("flashinfer", found, torch.bfloat16)
