"""The lossless matrix on trained models, on the GPU: deterministic mode, captured programs, drafts against a float32 reference.

The reference computes on the CPU, from the same weights. The engine's activations are BF16, so its drafts may be another than
the reference's first choice where scores are close: by less than `CLOSE`.
"""

from __future__ import annotations

import asyncio

import pytest
from speculation.lossless import Cell, Subject, check_captured, covering, requests
from speculation.test_lossless_trained import FEW, SUBJECTS, harness, reference, text_of

CLOSE = 0.5
"""Of logits; the models' have a standard deviation of 2 to 3."""
PAGE = 64
LONG = {"model.max_model_len": 320}
ON_GPU = {"engine.device": "cuda", "model.weight_precision": "auto", "kv.page_size": PAGE, **LONG}
made: dict[str, Subject] = {}


@pytest.fixture
def tested(name: str) -> Subject:
    """Made once for each."""
    if name not in made:
        target, method = name.split(": ")
        on_cpu = harness(target, method, **LONG)
        made[name] = Subject(
            method, harness(target, method, **ON_GPU), reference(target, method, on_cpu), requests(text_of(target), PAGE), CLOSE
        )
    return made[name]


def run(tested: Subject, cell: Cell) -> None:
    settings = dict(LONG)
    if cell.situation != "chunked prefill":
        # All begin at once: the first must not be done before the last has come.
        settings["scheduler.prefill_tokens"] = 16384
    compared = asyncio.run(check_captured(tested, cell, **settings))
    print(f"{cell}: {compared} drafts had one choice")
    assert compared > 0


@pytest.mark.parametrize("cell", FEW, ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_few_cells(tested: Subject, cell: Cell) -> None:
    run(tested, cell)


@pytest.mark.full
@pytest.mark.parametrize("cell", covering(), ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_pair_of_values(tested: Subject, cell: Cell) -> None:
    run(tested, cell)
