"""The backend `mla_fp8` in plain torch beside float64 on the same quantised values, over hand-built pages: ragged chunks behind
prefixes, decode and verification of unequal lengths, sequences without rows, in both orders of addition."""

from __future__ import annotations

import pytest
import torch
from mla_decode_cases import fresh_generator
from torch import Tensor

from fluentllm.core.batch import Batch
from fluentllm.core.errors import PluginError
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.attention_reference import gqa_reference, mla_reference
from fluentllm.kernels.mla_decode.reference import quantise_reference, quantised_query
from fluentllm.plugins.attn_mla_fp8 import plugin

PAGE, LENGTH, LAYERS, HEADS, SCALE = 16, 80, 2, 3, 0.3
LATENT, ROPE, NOPE, VALUE = 24, 8, 12, 10
KV = KVSpec(kind="mla", layers=LAYERS, latent_dim=LATENT, rope_dim=ROPE)
Chunks = list[tuple[int, int, int]]
"""(sequence, start, rows)."""


class Case:
    def __init__(self, *, deterministic: bool, sequences: int = 3) -> None:
        self.deterministic = deterministic
        generator = fresh_generator()
        pages = sequences * LENGTH // PAGE
        self.pool = KVPool(KV, pages, PAGE, torch.float8_e4m3fn, torch.device("cpu"))
        self.pool.latent.fill_(255)  # NaN in all three planes, wherever nothing is written
        self.table = (torch.randperm(pages, generator=generator) + 1).to(torch.int32).view(sequences, -1)
        model = ModelSpec(architecture="", vocab_size=9, hidden_size=8, layers=LAYERS, heads=HEADS, max_position=LENGTH, kv=KV)
        spec = AttentionSpec(
            model=model, device="cpu", dtype="float32", kv_dtype="float8_e4m3fn", page_size=PAGE, deterministic=deterministic
        )
        offered = {}
        plugin.fluent_attention(lambda name, factory, supports: offered.setdefault(name, (factory, supports)))
        factory, supports = offered["mla_fp8"]
        assert supports(spec) is None
        self.backend = factory(AttentionContext(spec, self.pool, Settings()))
        assert type(self.backend).__name__ == ("FixedOrderMlaFp8" if deterministic else "PlainMlaFp8")

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows = LAYERS, sequences, LENGTH
        self.q, self.latent, self.rope = random(*rows, HEADS, NOPE + ROPE), random(*rows, LATENT) * 10, random(*rows, ROPE) * 3
        self.up_k, self.up_v = random(HEADS, NOPE, LATENT) / 40, random(HEADS, VALUE, LATENT) / 40

    def run(self, chunks: Chunks, *, decode: bool = False, first_key: int = 0) -> None:
        """One pass through all layers, every row that has a key compared with the reference."""
        batch = self.batch(chunks, decode=decode)
        batch.first_key = first_key
        self.backend.begin(batch)
        seen = batch.positions >= first_key
        for layer in range(LAYERS):
            q, latent, rope = (self.rows(tensor[layer], chunks) for tensor in (self.q, self.latent, self.rope))
            out = self.backend.mla(
                layer, q[..., :NOPE], q[..., NOPE:], latent, rope, self.up_k, self.up_v, batch, SCALE
            )  # fmt: skip
            expected = self.expected(layer, chunks, decode, first_key)
            assert out.shape == (len(batch.positions), HEADS, VALUE)
            assert out.isfinite().all()
            torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=1e-4)

    def rows(self, tensor: Tensor, chunks: Chunks) -> Tensor:
        return torch.cat([tensor[0, :0], *(tensor[s, start : start + count] for s, start, count in chunks)])

    def expected(self, layer: int, chunks: Chunks, decode: bool, first_key: int) -> Tensor:
        parts = [torch.empty(0, HEADS, VALUE)]
        # Of the whole pass, as the backend has it: of fewer rows a product may end in another bit, and be quantised otherwise.
        absorbed = torch.bmm(self.rows(self.q[layer], chunks)[..., :NOPE].transpose(0, 1), self.up_k).transpose(0, 1)
        for (sequence, start, count), nope in zip(chunks, absorbed.split([count for *_, count in chunks]), strict=True):
            end = start + count
            exact = self.latent[layer, sequence, :end].double(), self.rope[layer, sequence, :end].double()
            content, aligned, scale = quantise_reference(*(part.float() for part in exact))
            kept = content.double() * scale[:, None], aligned.double() * scale[:, None]
            # What a prefill pass computes itself it reads as it is, but in deterministic mode.
            fresh = 0 if decode or self.deterministic else count
            latent, rope = (
                torch.cat((a[: end - fresh], b[end - fresh :]))[first_key:] for a, b in zip(kept, exact, strict=True)
            )
            q = self.q[layer, sequence, start:end]
            positions = (torch.arange(start, end) - first_key).clamp(min=0)
            if decode and not self.deterministic:
                query = torch.cat(quantised_query(nope, q[..., NOPE:]), -1)
                summed = gqa_reference(query, torch.cat((latent, rope), 1)[:, None], latent[:, None], positions, SCALE)
                part = torch.einsum("thc,hvc->thv", summed, self.up_v.double())
            else:
                up = self.up_k.double(), self.up_v.double()
                q = q.double()
                part = mla_reference(q[..., :NOPE], q[..., NOPE:], latent, rope, *up, positions, SCALE)
            parts.append(part.float())
        return torch.cat(parts)

    def batch(self, chunks: Chunks, *, decode: bool) -> Batch:
        counts, ends = [count for _, _, count in chunks], [start + count for _, start, count in chunks]
        slots = torch.tensor([sequence for sequence, _, _ in chunks], dtype=torch.int64)
        positions = torch.cat([torch.arange(0), *(torch.arange(start, start + count) for _, start, count in chunks)])
        sequences = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts, dtype=torch.int64))
        table = self.table[slots]
        return Batch(
            tokens=positions,
            positions=positions,
            sequences=sequences,
            slots=slots,
            query_start=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            kv_lengths=torch.tensor(ends, dtype=torch.int32),
            page_table=table,
            kv_rows=table[sequences, positions // PAGE].long() * PAGE + positions % PAGE,
            history=torch.zeros(len(self.table), LENGTH, dtype=torch.int32),
            page_size=PAGE,
            query_length=(counts[0] if counts else 1) if decode else None,
            query_lengths=None if decode else tuple(counts),
            kv_lengths_host=None if decode else tuple(ends),
        )


@pytest.fixture(params=[False, True], ids=["fast", "fixed order"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(deterministic=request.param)


def test_whole_prompts_and_chunks_side_by_side(case: Case) -> None:
    case.run([(0, 0, 17), (1, 0, 1), (2, 0, 16)])
    case.run([(0, 17, 15), (1, 1, 40), (2, 16, 1)])
    case.run([])
    case.run([(2, 17, 0), (1, 41, 2)])


@pytest.mark.parametrize("rows", [1, 4])
def test_decode_of_unequal_lengths(case: Case, rows: int) -> None:
    starts = [1, 15, 47]
    case.run([(s, 0, start) for s, start in enumerate(starts)])
    for step in range(3):
        case.run([(s, start + step * rows, rows) for s, start in enumerate(starts)], decode=True)
    case.run([], decode=True)


def test_keys_before_the_first_are_not_seen(case: Case) -> None:
    """A draft layer that has no pair for a sequence's first token."""
    case.run([(0, 0, 20), (1, 0, 1)], first_key=1)
    case.run([(0, 20, 9), (1, 1, 2)], first_key=1)
    case.run([(0, 29, 2), (1, 3, 2)], decode=True, first_key=1)


def test_other_layers_and_pages_stay_as_they_are(case: Case) -> None:
    before = case.pool.latent.random_().clone()
    chunks = [(0, 14, 4)]
    batch = case.batch(chunks, decode=False)
    case.backend.begin(batch)
    q, latent, rope = (case.rows(tensor[1], chunks) for tensor in (case.q, case.latent, case.rope))
    case.backend.mla(1, q[..., :NOPE], q[..., NOPE:], latent, rope, case.up_k, case.up_v, batch, SCALE)
    assert torch.equal(case.pool.latent[0], before[0])
    touched = case.table[0, :2].long()
    others = [page for page in range(before.shape[1]) if page not in touched]
    assert torch.equal(case.pool.latent[1, others], before[1, others])
    changed = (case.pool.latent[1, touched] != before[1, touched]).flatten(1).sum(1)
    width = LATENT + 4 + 2 * ROPE
    assert (changed <= 2 * width).all()  # two tokens in each of the two pages
    assert (changed > width).all()


def test_what_it_cannot_do_has_a_reason() -> None:
    reasons = {}
    plugin.fluent_attention(lambda name, factory, supports: reasons.setdefault(name, supports))
    model = ModelSpec(architecture="", vocab_size=1, hidden_size=1, layers=1, heads=1, max_position=1, kv=KV)
    given = {"model": model, "device": "cpu", "dtype": "float32", "deterministic": False}
    supports = reasons["mla_fp8"]
    assert "kv.dtype: fp8" in supports(AttentionSpec(**given, kv_dtype="bfloat16", page_size=16))
    assert "multiples of 16 tokens, not 24" in supports(AttentionSpec(**given, kv_dtype="float8_e4m3fn", page_size=24))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_model_that_the_backend_is_not_for_is_refused_with_its_name(deterministic: bool) -> None:
    """Where a plugin's `supports` said yes too often."""
    case = Case(deterministic=deterministic)
    q, k, v = (torch.zeros(1, 2, 16) for _ in range(3))
    with pytest.raises(PluginError, match=r"attn_mla_fp8\..*MlaFp8 was chosen for a model with grouped heads.*supports\(\)"):
        case.backend.gqa(0, q, k, v, None, 1.0)
