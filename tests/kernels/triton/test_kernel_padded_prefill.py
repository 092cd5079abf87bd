"""Prefill passes in tensors that stay where they are, padded, against the plain ones: the same hidden states, the same pool."""

from __future__ import annotations

import pytest
import torch
from test_kernel_backend import backends, small_llama, tables

from fluentllm.core.buckets import CAPTURED_TOKENS
from fluentllm.core.graphs import Graphs
from fluentllm.core.types import KVSpec, PrefillChunk
from fluentllm.kernels.ops import Ops
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.plugins.attn_triton.backend import TritonAttention
from fluentllm.plugins.attn_triton.expand import expand_on_device, expand_pages
from fluentllm.step.padded_prefill import PaddedPrefill
from fluentllm.step.prefill import prefill_batch

PASSES = [
    [PrefillChunk(slot=2, start=0, count=9, last=False), PrefillChunk(slot=0, start=0, count=1, last=False)],
    [PrefillChunk(slot=0, start=1, count=21, last=True), PrefillChunk(slot=1, start=0, count=3, last=True)],
    [PrefillChunk(slot=2, start=9, count=11, last=True)],
]


class Heard:
    """A `PassWatcher`."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def begin(self, plan: object) -> None: ...

    def layer(self, layer: int) -> None:
        self.layers.append(layer)

    def end(self) -> None: ...


@pytest.mark.parametrize("following", [False, True])
def test_a_model_computes_the_same(following: bool, device: torch.device, rng: torch.Generator) -> None:
    made = tables(device, rng)
    kv = KVSpec(kind="gqa", layers=1, heads=2, head_dim=16, v_head_dim=16)
    plain, ours = backends(kv, made)
    assert isinstance(ours, TritonAttention)
    ops: list[Ops] = [PlainOps(), TritonOps()]
    models = [small_llama(each, device) for each in ops]
    heard = Heard() if following else None
    graphs: Graphs[None] = Graphs()
    padded = PaddedPrefill(models[1], ours, made, graphs, heard)
    for chunks in PASSES:
        graphs.clear()  # a key's first run is eager: there may be no GPU
        expected_batch = prefill_batch(chunks, made)
        expected = models[0].forward(expected_batch, plain)
        found = padded.run(chunks)
        assert found is not None
        batch, hidden = found
        torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-4)
        for name in ("tokens", "positions", "sequences", "slots", "query_start", "kv_lengths", "page_table", "kv_rows"):
            assert torch.equal(getattr(batch, name), getattr(expected_batch, name)), name
        assert (batch.query_lengths, batch.kv_lengths_host) == (expected_batch.query_lengths, expected_batch.kv_lengths_host)
    if heard is not None:
        assert heard.layers == [0] * len(PASSES)


def test_more_tokens_than_are_captured(device: torch.device, rng: torch.Generator) -> None:
    made = tables(device, rng)
    _, ours = backends(KVSpec(kind="gqa", layers=1, heads=2, head_dim=16, v_head_dim=16), made)
    assert isinstance(ours, TritonAttention)
    padded = PaddedPrefill(small_llama(TritonOps(), device), ours, made, Graphs())
    assert padded.run([PrefillChunk(slot=0, start=0, count=CAPTURED_TOKENS + 1, last=True)]) is None


def test_expanded_pages_are_those_of_the_host(device: torch.device, rng: torch.Generator) -> None:
    made = tables(device, rng)
    for chunks in PASSES:
        batch = prefill_batch(chunks, made)
        expected = expand_pages(batch)
        count = expected.sources.shape[0]
        for more in (0, 5):
            found = expand_on_device(batch, count + more)
            assert torch.equal(found.sources[:count], expected.sources)
            assert found.sources.shape == (count + more,)
            for i, keys in enumerate(batch.kv_lengths_host or ()):
                pages = -(-keys // batch.page_size)
                assert torch.equal(found.page_table[i, :pages], expected.page_table[i, :pages])
