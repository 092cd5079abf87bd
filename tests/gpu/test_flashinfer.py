"""The backend `flashinfer` against attention in float64: ragged and empty passes, cached prefixes, under capture, in an engine.

Its modules must have been compiled, by a server that ran long enough or by `compiling.main`; else these tests skip.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluentllm.core.batch import Batch
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings, SpeculativeSettings
from fluentllm.core.types import KVSpec, ModelSpec

from .models import engine, prompts, small, tokens_of

plugin = pytest.importorskip("fluentllm.plugins.attn_flashinfer").plugin

SCALE = 0.09
LONGEST = 3000
DTYPE = torch.bfloat16
MLA = KVSpec(kind="mla", layers=2, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128)


def gqa(kv_heads: int) -> KVSpec:
    return KVSpec(kind="gqa", layers=2, heads=kv_heads, head_dim=128, v_head_dim=128)


@dataclass
class Case:
    """A pool full of random KV, and a backend on it; sequences' pages are scattered over the pool."""

    kv: KVSpec
    heads: int
    page_size: int
    sequences: int = 5
    drafts: int = 0

    def __post_init__(self) -> None:
        self.device = torch.device("cuda")
        width = -(-LONGEST // self.page_size)
        self.pool = KVPool(self.kv, self.sequences * width, self.page_size, DTYPE, self.device)
        for tensor in (self.pool.k, self.pool.v, self.pool.latent):
            tensor.normal_()
        self.table = (torch.randperm(self.sequences * width) + 1).view(self.sequences, width).to(self.device, torch.int32)
        model = ModelSpec(
            architecture="", vocab_size=9, hidden_size=8, layers=2, heads=self.heads, max_position=LONGEST, kv=self.kv
        )
        spec = AttentionSpec(
            model=model,
            device="cuda",
            dtype="bfloat16",
            kv_dtype="bfloat16",
            page_size=self.page_size,
            deterministic=False,
            phases=("prefill",) if self.kv.kind == "mla" else ("prefill", "decode"),
        )
        offered = {}
        plugin.fluent_attention(lambda name, factory, supports: offered.setdefault(name, (factory, supports)))
        factory, supports = offered["flashinfer"]
        reason = supports(spec)
        if reason is not None:
            pytest.skip(reason)
        speculative = SpeculativeSettings(method="pld", k=self.drafts) if self.drafts else SpeculativeSettings()
        self.backend = factory(AttentionContext(spec, self.pool, Settings(speculative=speculative)))
        self.backend.load()

    def batch(self, chunks: list[tuple[int, int]], *, decode: bool) -> Batch:
        """(start, rows) of each sequence."""
        rows, ends = [count for _, count in chunks], [start + count for start, count in chunks]
        slots = torch.arange(len(chunks), device=self.device)
        positions = torch.cat([torch.arange(0), *(torch.arange(start, start + count) for start, count in chunks)]).to(
            self.device
        )
        sequences = slots.repeat_interleave(torch.tensor(rows, dtype=torch.int64, device=self.device))
        table = self.table[slots]
        batch = Batch(
            tokens=torch.zeros_like(positions),
            positions=positions,
            sequences=sequences,
            slots=slots,
            query_start=torch.tensor([0, *rows], device=self.device).cumsum(0).to(torch.int32),
            kv_lengths=torch.tensor(ends, dtype=torch.int32, device=self.device),
            page_table=table,
            kv_rows=table[sequences, positions // self.page_size].long() * self.page_size + positions % self.page_size,
            history=torch.zeros(1, 1, dtype=torch.int32, device=self.device),
            page_size=self.page_size,
            query_length=rows[0] if decode and rows else 1 if decode else None,
            query_lengths=None if decode else tuple(rows),
            kv_lengths_host=None if decode else tuple(ends),
        )
        if not self.backend.serves(batch):
            pytest.skip(f"FlashInfer's modules for this are not compiled; {self.backend._modules.trouble or 'being compiled'}")
        return batch

    def inputs(self, rows: int) -> tuple[Tensor, ...]:
        if self.kv.kind == "gqa":
            shapes: tuple[tuple[int, ...], ...] = (self.heads, 128), (self.kv.heads, 128), (self.kv.heads, 128)
        else:
            shapes = (self.heads, 128), (self.heads, 64), (512,), (64,)
        return tuple(torch.randn(rows, *shape, device=self.device).to(DTYPE) for shape in shapes)

    def known(self, layer: int, sequence: int, length: int) -> tuple[Tensor, ...]:
        pages = self.table[sequence].long()
        tensors = (self.pool.latent,) if self.kv.kind == "mla" else (self.pool.k, self.pool.v)
        return tuple(tensor[layer][pages].flatten(0, 1)[:length].double() for tensor in tensors)


def causal(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [T, H, D], the last rows of keys [L, Hkv, D], values [L, Hkv, Dv], float64 → [T, H, Dv]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("thd,lhd->htl", q, keys) * SCALE
    rows, length = q.shape[0], keys.shape[0]
    hidden = torch.ones(rows, length, dtype=torch.bool, device=q.device).triu(length - rows + 1)
    return torch.einsum("htl,lhd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """Within what BF16 explains: weights and results are rounded to eight bits."""
    assert ours.isfinite().all()
    error = (ours.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    assert error < 0.01, f"relative error {error:.4f}"


def check_gqa(case: Case, layer: int, q: Tensor, ours: Tensor, chunks: list[tuple[int, int]]) -> None:
    start = 0
    for sequence, (before, rows) in enumerate(chunks):
        part = slice(start, start + rows)
        keys, values = case.known(layer, sequence, before + rows)
        assert_near(ours[part], causal(q[part].double(), keys, values))
        start += rows


@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(16, 8, 16), (32, 8, 16), (16, 8, 64)])
def test_decode(heads: int, kv_heads: int, page_size: int) -> None:
    case = Case(gqa(kv_heads), heads, page_size)
    for count in (5, 1):
        chunks = [(random.randrange(LONGEST - 1), 1) for _ in range(count - 1)] + [(0, 1)]
        batch = case.batch(chunks, decode=True)
        case.backend.begin(batch)
        for layer in range(2):
            q, k, v = case.inputs(count)
            check_gqa(case, layer, q, case.backend.gqa(layer, q, k, v, batch, SCALE), chunks)


def test_an_empty_decode() -> None:
    case = Case(gqa(8), 16, 16)
    batch = case.batch([], decode=True)
    case.backend.begin(batch)
    assert case.backend.gqa(0, *case.inputs(0), batch, SCALE).shape == (0, 16, 128)


def test_verification_of_drafts() -> None:
    case = Case(gqa(8), 16, 16, drafts=3)
    chunks = [(random.randrange(LONGEST - 4), 4) for _ in range(4)] + [(0, 4)]
    batch = case.batch(chunks, decode=True)
    case.backend.begin(batch)
    q, k, v = case.inputs(20)
    check_gqa(case, 1, q, case.backend.gqa(1, q, k, v, batch, SCALE), chunks)


def test_captured_decode_follows_lengths_and_pages_on_the_device() -> None:
    case = Case(gqa(8), 16, 16)
    batch = case.batch([(7, 1)] * 5, decode=True)
    inputs = case.inputs(5)

    def run() -> Tensor:
        case.backend.begin(batch)
        return case.backend.gqa(0, *inputs, batch, SCALE)

    with torch.cuda.stream(torch.cuda.Stream()):
        run()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = run()
        for _ in range(3):
            chunks = [(random.randrange(LONGEST - 1), 1) for _ in range(5)]
            case.table.copy_(case.table[torch.randperm(5)])
            now = case.batch(chunks, decode=True)
            for name in ("kv_lengths", "kv_rows", "page_table"):
                getattr(batch, name).copy_(getattr(now, name))
            for held, fresh in zip(inputs, case.inputs(5), strict=True):
                held.copy_(fresh)
            graph.replay()
            torch.cuda.synchronize()
            check_gqa(case, 0, inputs[0], out, chunks)


@pytest.mark.parametrize("page_size", [16, 64])
def test_prefill_behind_cached_prefixes(page_size: int) -> None:
    case = Case(gqa(8), 16, page_size)
    for chunks in ([(0, 1)], [(0, 700), (1500, 130), (64, 1), (0, 17), (2048, 600)], [(0, 128), (999, 2)]):
        batch = case.batch(chunks, decode=False)
        case.backend.begin(batch)
        for layer in range(2):
            q, k, v = case.inputs(sum(rows for _, rows in chunks))
            check_gqa(case, layer, q, case.backend.gqa(layer, q, k, v, batch, SCALE), chunks)


def test_many_prefills_under_way_at_once() -> None:
    """Plans are copied from pinned memory: the host is ahead of the device by more passes than there are plans."""
    case = Case(gqa(8), 16, 16)
    done = []
    torch.cuda._sleep(200_000_000)
    for _ in range(9):
        chunks = [(random.randrange(1000), random.randrange(1, 900)) for _ in range(4)]
        batch = case.batch(chunks, decode=False)
        case.backend.begin(batch)
        q, k, v = case.inputs(sum(rows for _, rows in chunks))
        ours = case.backend.gqa(0, q, k, v, batch, SCALE)
        done.append((chunks, q, ours, [case.known(0, i, sum(chunk)) for i, chunk in enumerate(chunks)]))
    for chunks, q, ours, known in done:
        start = 0
        for (_, rows), (keys, values) in zip(chunks, known, strict=True):
            assert_near(ours[start : start + rows], causal(q[start : start + rows].double(), keys, values))
            start += rows


def test_mla_prefill_behind_cached_prefixes() -> None:
    case = Case(MLA, 16, 64)
    up_k, up_v = ((torch.randn(16, 128, 512, device=case.device) / 20).to(DTYPE) for _ in range(2))
    for chunks in ([(0, 1)], [(0, 300), (1500, 130), (64, 1), (2048, 200)]):
        batch = case.batch(chunks, decode=False)
        case.backend.begin(batch)
        for layer in range(2):
            q_nope, q_rope, latent, k_rope = case.inputs(sum(rows for _, rows in chunks))
            ours = case.backend.mla(layer, q_nope, q_rope, latent, k_rope, up_k, up_v, batch, SCALE)
            start = 0
            for sequence, (before, rows) in enumerate(chunks):
                part = slice(start, start + rows)
                known, rope = case.known(layer, sequence, before + rows)[0].split((512, 64), -1)
                keys = torch.cat((torch.einsum("lc,hnc->lhn", known, up_k.double()), rope.unsqueeze(1).expand(-1, 16, -1)), -1)
                values = torch.einsum("lc,hvc->lhv", known, up_v.double())
                q = torch.cat((q_nope[part], q_rope[part]), -1).double()
                assert_near(ours[part], causal(q, keys, values))
                start += rows


def test_an_engine_decodes_by_it_and_never_waits_for_the_device(tmp_path: Path) -> None:
    case = Case(gqa(2), 4, 16)
    case.batch([(7, 1)], decode=True)
    case.batch([(0, 7)], decode=False)
    settings = {"attention.backend": "flashinfer", "kv.page_size": 16, "engine.overlap_depth": 2}
    with engine(small("qwen3-0.6b", tmp_path), **settings) as local:

        def run() -> list[list[int]]:
            async def every() -> list[list[int]]:
                client = local.generation.client
                return await asyncio.gather(*(tokens_of(client, p, number, 0.0) for number, p in enumerate(prompts(11, 300))))

            return local.call(every())

        run()
        run()
        local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("error")).result()
        try:
            assert all(run())
        finally:
            local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("default")).result()
        assert len(local.engine.executor.programs._graphs), "nothing was captured"
