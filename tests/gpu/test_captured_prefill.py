"""Prefill passes that are captured: the hidden states of passes without padding, and layers told one by one all the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fluentllm.core.types import PrefillChunk, SlotInit
from fluentllm.core.types.requests import SamplingParams
from fluentllm.step.padded_prefill import PaddedPrefill
from fluentllm.step.prefill import prefill_batch
from fluentllm.step.programs import StepPrograms

from .models import SMALL, VOCABULARY, engine, small

PASSES = [[(0, 300)], [(1, 3), (0, 130), (2, 1)], [(2, 200), (1, 90)], [(1, 1), (2, 1)], [(0, 1500)], [(1, 1), (2, 1)]]
"""(slot, tokens) of each chunk, pass by pass."""


@torch.inference_mode()
def compare(programs: StepPrograms, seed: int) -> None:
    """Each pass three times with other tokens: by itself, captured, replayed."""
    rng = random.Random(seed)
    model, tables, graphs = programs.model, programs.tables, programs._graphs
    padded = programs._padded_prefill
    assert graphs is not None
    assert padded is not None
    before = len(graphs)
    for _ in range(3):
        for slot in range(3):
            tokens = [rng.randrange(VOCABULARY) for _ in range(2200)]
            pages = list(range(1 + slot * tables.max_pages, 1 + (slot + 1) * tables.max_pages))
            tables.admit(SlotInit(slot, 0, tokens, len(tokens), 0, pages, SamplingParams(max_tokens=1), []), 0)
        starts = [0, 0, 0]
        for lengths in PASSES:
            chunks = []
            for slot, count in lengths:
                chunks.append(PrefillChunk(slot, starts[slot], count, False))
                starts[slot] += count
            batch = prefill_batch(chunks, tables)
            expected = model.forward(batch, programs.attention).clone()
            found = padded.run(chunks)
            assert found is not None
            padded_batch, hidden = found
            assert torch.equal(padded_batch.tokens, batch.tokens)
            assert torch.equal(padded_batch.kv_rows, batch.kv_rows)
            assert torch.isfinite(hidden).all()
            error = (hidden.double() - expected.double()).norm() / expected.double().norm()
            assert error < 2e-2, (lengths, float(error))  # bfloat16, products of other shapes
    assert len(graphs) - before >= 3, "passes of so many sizes"
    assert not graphs._uncapturable


@pytest.mark.parametrize("name", SMALL)
def test_padded_passes_compute_the_same(name: str, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    with engine(small(name, tmp_path)) as local:
        local.engine.executor.call(lambda: compare(local.engine.executor.programs, seed)).result()


def test_a_followed_pass_is_cut_behind_each_layers_keys(tmp_path: Path) -> None:
    """Behind the call for a layer, on the stream, its keys are written, and those of the next one are not."""
    with engine(small("qwen3-0.6b", tmp_path)) as local:

        @torch.inference_mode()
        def follow() -> None:
            programs = local.engine.executor.programs
            tables = programs.tables
            pool = local.engine.executor.programs.attention
            keys = [rows[0] for rows in pool._rows]
            tables.admit(SlotInit(0, 0, list(range(600)), 600, 0, list(range(1, 100)), SamplingParams(max_tokens=1), []), 0)
            seen: list[list[bool]] = []

            class Watcher:
                def begin(self, plan: object) -> None: ...

                def layer(self, layer: int) -> None:
                    written = [rows[16 : 16 + 500].count_nonzero() > 0 for rows in keys]
                    seen.append([bool(flag) for flag in written] + [layer])

                def end(self) -> None: ...

            assert programs._graphs is not None
            padded = PaddedPrefill(programs.model, programs.attention, tables, programs._graphs, Watcher())
            programs._graphs.clear()
            for _ in range(4):
                for rows in keys:
                    rows.zero_()
                assert padded.run([PrefillChunk(0, 0, 500, True)]) is not None
            layers = len(keys)
            expected = [[other <= layer for other in range(layers)] + [layer] for layer in range(layers)]
            assert seen == expected * 4
            [pieces] = [pieces for pieces, _ in programs._graphs._captured.values()]
            assert len(pieces) == layers + 1

        local.engine.executor.call(follow).result()
