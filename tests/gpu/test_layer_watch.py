"""Prefill passes on a GPU are followed layer by layer: what is told of a layer is true, and told while later ones compute."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from fluentllm.core.types import PrefillChunk, StepPlan
from fluentllm.plugins.kv_layerwise.watch import Progress, StreamWatch

from .models import VOCABULARY, engine, small, tokens_of

LAYERS, TOKENS = 8, 100


def test_layers_are_told_in_order_while_later_ones_compute() -> None:
    plan = StepPlan(step=3, prefill=[PrefillChunk(0, 0, TOKENS, True)])
    chunk, whole = Progress(), torch.cuda.Event()
    kv = torch.zeros(LAYERS, 1024, device="cuda")
    side = torch.cuda.Stream()
    seen: list[tuple[int, bool, bool]] = []
    passed: list[tuple[float, int]] = []
    done = threading.Event()

    def advanced() -> None:
        with torch.cuda.stream(side):
            written = bool((kv[: chunk.layers] == 1).all())  # waits for `side` alone, which has nothing else to do
        seen.append((chunk.layers, written, whole.query()))

    def ended(seconds: float, tokens: int) -> None:
        passed.append((seconds, tokens))
        done.set()

    # A kernel that is loaded at its first use may wait for all that is queued.
    assert bool((kv[:2] == 0).all())
    assert bool((kv[:8] == 0).all())
    watch = StreamWatch(advanced, ended)
    try:
        watch.group = 2
        watch.expect(3, [chunk])
        torch.cuda.synchronize()
        started = time.perf_counter()
        watch.begin(plan)
        for layer in range(LAYERS):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            kv[layer].fill_(1)
            watch.layer(layer)
        whole.record()
        watch.end()
        enqueued = time.perf_counter() - started
        assert done.wait(10)
        total = time.perf_counter() - started
    finally:
        watch.close()
    assert [layers for layers, _, _ in seen] == [2, 4, 6, 8, 8]
    assert all(written for _, written, _ in seen)
    assert not any(over for _, _, over in seen[:3])  # two layers and more were still to be computed
    assert enqueued < total / 4  # the launching thread waited for nothing
    [(seconds, tokens)] = passed
    assert tokens == TOKENS
    assert seconds == pytest.approx(total, rel=0.25)  # of the device, not of the launches


def test_the_passes_of_a_whole_model(tmp_path: Path) -> None:
    prompt = [7 * i % VOCABULARY for i in range(1500)]
    with engine(small("qwen3-0.6b", tmp_path)) as local:
        client = local.generation.client
        for _ in range(3):  # by themselves, captured, replayed: none of this may stay
            expected = local.call(tokens_of(client, prompt, 0, 0.0, 8))
            local.engine.clear_cache()
        chunks = [Progress() for _ in range(64)]
        seen: list[int] = []
        watch = StreamWatch(lambda: seen.append(max(chunk.layers for chunk in chunks)), lambda seconds, tokens: None)
        first = local.engine.stats().steps
        for number, chunk in enumerate(chunks):
            watch.expect(first + number, [chunk])
        try:
            local.engine.executor.call(lambda: local.engine.executor.programs.watch(watch)).result()
            assert local.call(tokens_of(client, prompt, 0, 0.0, 8)) == expected
        finally:
            watch.close()
        layers = local.engine.info.spec.kv.layers
        assert seen[:layers] == [*range(1, layers + 1)]
        assert [chunk.layers for chunk in chunks if chunk.ended] == [layers] * sum(chunk.ended for chunk in chunks)
        assert any(chunk.ended for chunk in chunks)
