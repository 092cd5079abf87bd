"""Deterministic mode for dense models: the same bits whatever the batch, the chunks and the kind of pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from driver import Driver
from oracle import SCENARIOS, load_ours, make_oracle
from test_llama import CONFIGS as LLAMA
from test_qwen import CONFIGS as QWEN

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

KINDS = {"llama_biases": LLAMA, "mistral": LLAMA, "qwen2": QWEN, "qwen3": QWEN, "qwen3_moe": QWEN}


@pytest.fixture(scope="module", params=KINDS)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[list[int]]]:
    """A model, and the tokens of some sequences."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    oracle = make_oracle(KINDS[request.param][request.param](), folder)
    return load_ours(folder, deterministic=True), oracle.tokens


def alone(model: Any, tokens: list[list[int]]) -> list[Tensor]:
    return SCENARIOS["prefill"](Driver(model, tokens, deterministic=True), [len(t) for t in tokens])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_do_not_depend_on_how_rows_are_cut_into_passes(setting: tuple[Any, list[list[int]]], scenario: str) -> None:
    model, tokens = setting
    out = SCENARIOS[scenario](Driver(model, tokens, deterministic=True, seed=1), [len(t) for t in tokens])
    for ours, expected in zip(out, alone(model, tokens), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("query", range(1, 9))
def test_nor_on_the_query_length(setting: tuple[Any, list[list[int]]], query: int) -> None:
    """As verification of 0 to 7 drafts, of several sequences together."""
    model, tokens = setting
    driver = Driver(model, tokens, deterministic=True, seed=2)
    lengths = [len(t) for t in tokens]
    driver.run([(s, 0, n - query) for s, n in enumerate(lengths)])
    last = driver.run([(s, n - query, query) for s, n in enumerate(lengths)], decode=True)
    for ours, expected in zip(last, alone(model, tokens), strict=True):
        assert torch.equal(ours, expected[-query:])


def test_nor_on_a_batch_of_sixty_four(setting: tuple[Any, list[list[int]]]) -> None:
    model, tokens = setting
    many = [tokens[i % len(tokens)] for i in range(64)]
    driver = Driver(model, many, deterministic=True, seed=3)
    driver.run([(s, 0, len(t) - 1) for s, t in enumerate(many)])
    last = driver.run([(s, len(t) - 1, 1) for s, t in enumerate(many)], decode=True)
    expected = alone(model, tokens)
    for number, ours in enumerate(last):
        assert torch.equal(ours, expected[number % len(tokens)][-1:])
