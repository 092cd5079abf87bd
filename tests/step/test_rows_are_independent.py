"""Deterministic mode, the half after the logits: a row's draw has the same bits in any batch, at any place in it."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from fluentllm.core.sequence import features_of
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import Feature, SamplingParams, SlotInit
from fluentllm.kernels.sampling import filter_logits, gumbel_noise
from fluentllm.step.logprobs import logprobs_of
from fluentllm.step.processors import process_logits
from fluentllm.step.sample import draw

VOCAB = 1003
SLOTS = 64
EVERYTHING = Feature.SAMPLING | Feature.PENALTIES | Feature.BIAS | Feature.LOGPROBS | Feature.FILTER | Feature.MIN_TOKENS


@pytest.fixture(scope="module")
def tables() -> SlotTables:
    tables = SlotTables(SLOTS, 64, 16, VOCAB, torch.device("cpu"))
    for slot in range(SLOTS):
        params = SamplingParams(
            max_tokens=20,
            min_tokens=slot % 3 * 9,
            temperature=slot % 4 * 0.4,
            top_k=slot % 5 * 7,
            top_p=1 - slot % 7 * 0.1,
            min_p=slot % 3 * 0.01,
            seed=slot,
            repetition_penalty=1 + slot % 2 * 0.3,
            frequency_penalty=slot % 3 * 0.2,
            logit_bias={slot: 2.0} if slot % 2 else {},
        )
        history = [(slot * 31 + i * i) % VOCAB for i in range(20)]
        tables.admit(SlotInit(slot, 1, history, 12, 0, [1], params, [2, slot]), features_of(params) | EVERYTHING)
    return tables


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(SLOTS, VOCAB, generator=torch.Generator().manual_seed(0)) * 4


def step(rows: torch.Tensor, logits: torch.Tensor, tables: SlotTables) -> list[torch.Tensor]:
    """Processed logits, draws and logprobs of some slots together."""
    positions = tables.length[rows]
    none = torch.empty(len(rows), 0, dtype=torch.int64)
    processed = process_logits(logits[rows].clone(), rows, positions, none, tables, EVERYTHING)
    drawn = draw(processed, rows, positions, tables, EVERYTHING)
    filtered = filter_logits(processed, tables.top_k[rows], tables.top_p[rows], tables.min_p[rows])
    noise = gumbel_noise(tables.seed[rows], positions, VOCAB)
    return [processed, drawn, filtered, noise, *astuple(logprobs_of(logits[rows], drawn))]


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 16, 33, 64])
def test_batches_give_the_bits_of_single_rows(batch: int, tables: SlotTables, logits: torch.Tensor) -> None:
    alone = [step(torch.tensor([slot]), logits, tables) for slot in range(SLOTS)]
    order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(batch))
    for rows in order.split(batch):
        together = step(rows, logits, tables)
        for place, slot in enumerate(rows.tolist()):
            for one, many in zip(alone[slot], together, strict=True):
                assert torch.equal(one[0], many[place])
