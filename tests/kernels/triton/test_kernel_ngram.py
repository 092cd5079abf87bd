"""N-gram embedding against `kernels.ngram` and the definition of the mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fluentllm.kernels.ngram import NgramHash, NgramTables, ngram_ids
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.ngram import ngram_embedding, ngram_gather
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.kernels.triton.streamed_weight import StreamedWeight
from fluentllm.kernels.weights import DenseWeight


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_ngram(tokens: int, pinned: bool, device: torch.device, rng: torch.Generator) -> None:
    if pinned and device.type == "cpu":
        pytest.skip("pinned memory needs a GPU")
    hash_ = NgramHash(vocab=50, ratio=3.5, neighbors=3, splits=2, stops=(0, 7))
    hidden, slots = 96, 5
    width = hidden // hash_.tables
    sizes = [hash_.rows(i) for i in range(hash_.tables)]
    starts = torch.tensor([sum(sizes[:i]) for i in range(hash_.tables)])
    tables, words = torch.randn(sum(sizes), width, generator=rng), torch.randn(50, hidden, generator=rng)
    projection = torch.randn(hidden, hidden, generator=rng) * hidden**-0.5
    history = torch.randint(0, 50, (slots, 9), generator=rng, dtype=torch.int32)
    ids = torch.randint(0, 50, (tokens,), generator=rng)
    positions = torch.randint(0, 9, (tokens,), generator=rng)
    lines = torch.randint(0, slots, (tokens,), generator=rng)
    stops, factors, moduli = torch.tensor(hash_.stops), hash_.factors(), hash_.moduli()
    expected = F.embedding(ngram_ids(ids, positions, lines, history, stops, factors, moduli) + starts, tables).flatten(1)
    on_device = [t.to(device) for t in (ids, positions, lines, history, stops, factors, moduli, starts)]
    rows, word_rows = ngram_gather(*on_device, tables.pin_memory() if pinned else tables.to(device), words.to(device))
    assert torch.equal(rows.cpu(), expected)
    assert torch.equal(word_rows.cpu(), words[ids])
    mean = (words[ids] + expected @ projection.T) / (1 + hash_.tables)
    assert_close(ngram_embedding(rows, word_rows, projection.to(device), hash_.tables).cpu(), mean, rtol=1e-4, atol=1e-4)
    # As a model asks for it: with weights for few rows, and for any number.
    made = NgramTables(tables.pin_memory() if pinned else tables.to(device), *on_device[7:8], *on_device[5:7], on_device[4])
    for packed in (StreamedWeight(projection.to(device)), DenseWeight(projection.to(device))):
        for ops in (TritonOps(), PlainOps()):
            out = ops.ngram_embedding(*on_device[:4], made, words.to(device), packed)
            assert_close(out.cpu(), mean, rtol=1e-4, atol=1e-4)
