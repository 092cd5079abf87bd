"""A step's kernels inside a CUDA graph: what was captured stays right when lengths, tokens and pages change on the device."""

from __future__ import annotations

import os

import pytest
import torch
from paged import random_paged

from fluentllm.kernels.attention_reference import gqa_reference
from fluentllm.kernels.sampling import gumbel_noise
from fluentllm.kernels.triton.draw import draw
from fluentllm.kernels.triton.gqa_decode import gqa_decode
from fluentllm.kernels.triton.gqa_plan import plan_gqa
from fluentllm.kernels.triton.moe import experts
from fluentllm.kernels.triton.prompt_lookup import prompt_lookup

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="CUDA graphs need a GPU")


def capture(step):
    """Runs `step` once to compile its kernels, then captures it with every host synchronisation an error."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph, out


def test_decode_attention_follows_the_lengths(device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([3000, 1, 700, 64], rng, device, kv_heads=2, dim=128, page_size=64, dtype=torch.bfloat16)
    q = torch.randn(8, 8, 128, generator=rng).to(device, torch.bfloat16)
    longest = paged.table.shape[1] * 64

    def step() -> torch.Tensor:
        plan = plan_gqa(paged.lengths, kv_heads=2, longest=longest)
        return gqa_decode(q, paged.k, paged.v, paged.table, paged.lengths, plan, 2, 128**-0.5)

    paged.lengths[1] = 2
    graph, out = capture(step)
    for lengths in ([3000, 2, 700, 64], [5, 2999, 2, 2000], [2, 2, 2, 2]):
        paged.lengths.copy_(torch.tensor(lengths))
        q.copy_(torch.randn(q.shape, generator=rng))
        graph.replay()
        for i, length in enumerate(lengths):
            k, v = paged.keys(i)
            expected = gqa_reference(q[2 * i : 2 * i + 2].double(), k, v, torch.arange(length - 2, length), 128**-0.5)
            torch.testing.assert_close(out[2 * i : 2 * i + 2].double(), expected, rtol=0.02, atol=0.02)


def test_experts_draws_and_lookup_capture(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(6, 64, generator=rng).to(device, torch.bfloat16)
    gate_up, down = (torch.randn(*s, generator=rng).to(device, torch.bfloat16) * 0.1 for s in ((8, 64, 64), (8, 64, 32)))
    weights = torch.rand(6, 2, generator=rng).to(device)
    ids = torch.randint(0, 10, (6, 2), generator=rng, dtype=torch.int32).to(device)
    logits = torch.randn(6, 5000, generator=rng).to(device)
    slots = torch.arange(6, device=device)
    heat, seeds = torch.ones(6, device=device), torch.arange(6, device=device) * 7919
    history = torch.randint(0, 3, (6, 500), generator=rng, dtype=torch.int32).to(device)
    lengths = torch.full((6,), 100, device=device)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = experts(x, weights, ids, gate_up, down)
        drawn = draw(logits, slots, slots, heat, seeds)
        return made, drawn, prompt_lookup(history, slots, lengths, 3, 2, 4)[0]

    graph, out = capture(step)
    ids.copy_(torch.randint(0, 10, (6, 2), generator=rng, dtype=torch.int32))
    logits.copy_(torch.randn(logits.shape, generator=rng))
    lengths.fill_(400)
    graph.replay()
    for ours, eager in zip(out, step(), strict=True):
        assert torch.equal(ours, eager)
    scores = logits + gumbel_noise(seeds, slots, 5000)
    assert (scores.amax(1) - scores.gather(1, out[1].unsqueeze(1)).squeeze(1) < 1e-4).all()
