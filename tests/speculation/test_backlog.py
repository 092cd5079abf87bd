"""A draft layer that catches up: rows that wait while nothing is drafted are computed before they are missed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from fluentllm.core.draft_length import Choice

from . import eagle, mtp
from .watching import Drafted, unchanged, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.harness import Harness

K = 3


@pytest.fixture(scope="module", params=["eagle", "mtp"])
def method(request: pytest.FixtureRequest) -> str:
    """On grouped heads, and on MLA."""
    return str(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["deterministic", "fast"])
def model(method: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder = tmp_path_factory.mktemp(method)
    made = eagle.harness(folder, "eagle3", "llama") if method == "eagle" else mtp.harness(folder, "longcat")
    made.overrides["engine.deterministic"] = request.param
    return made


async def drafts_of(model: Harness, choices: Iterator[int], requests: list[tuple[list[int], int]]) -> list[Drafted]:
    """One request after the other, (prompt, tokens); without a prompt: what the request before it has said in all."""
    record: list[Drafted] = []
    settings = {"speculative.method": "watched", "speculative.k": K, "engine.overlap_depth": 0}
    async with model.engine(plugins=watched(model.overrides["speculative.method"], record, unchanged), **settings) as running:
        lengths = running.engine.draft_length
        assert lengths is not None
        lengths.choose = lambda batch: Choice(next(choices))  # type: ignore[method-assign]
        seen: list[int] = []
        for prompt, tokens in requests:
            given = prompt or seen
            outputs = await running.outputs(running.submit(given, max_tokens=tokens, ignore_eos=True))
            seen = [*given, *(token for output in outputs for token in output.tokens)]
    return record


def compared(model: Harness, record: list[Drafted]) -> int:
    """Drafts that are the reference's."""
    drafting = model.overrides["speculative.method"]
    target = model.loaded.model
    reference = eagle.Reference(target, "eagle3") if drafting == "eagle" else mtp.Reference(target)
    sure = sum(drafted.check(reference) for drafted in record)
    assert sure > 0.9 * sum(len(drafted.drafts) for drafted in record)
    return sure


@pytest.mark.parametrize("quiet", [1, 3, 7, 8, 9, 20])
async def test_drafts_after_steps_without(model: Harness, quiet: int) -> None:
    """Pages have 8 tokens: what waits is less than a page, a page, and more."""
    record = await drafts_of(model, itertools.cycle([0] * quiet + [K, K]), [([5, 9, 7, 11, 4], 60)])
    assert compared(model, record) >= K * 4


@pytest.mark.parametrize("tokens", [19, 27, 30])
async def test_a_prefix_that_was_decoded_without_drafts(model: Harness, tokens: int) -> None:
    """Its pages have the layer's KV, and the states at their ends, though nobody drafted while they were filled."""
    prompt = [5, 9, 7, 11, 4]
    choices = itertools.chain([0] * tokens, itertools.repeat(K))
    record = await drafts_of(model, choices, [(prompt, tokens), ([], 12)])
    assert compared(model, record) >= K * 3
    assert min(len(drafted.history) for drafted in record if drafted.drafts) > len(prompt) + tokens


async def test_rows_of_a_request_that_is_gone(model: Harness) -> None:
    """Another is in its slot, whose prompt holds the positions that waited."""
    first, second = [5, 9, 7, 11, 4], [21, 8, 30, 2, 19, 6, 40, 41, 9, 77, 31, 12, 5, 8, 90, 4, 3, 66, 23]
    record = await drafts_of(model, itertools.chain([0] * 8, itertools.cycle([0, 0, K])), [(first, 7), (second, 30)])
    assert compared(model, [drafted for drafted in record if drafted.history[: len(second)] == second]) >= K * 4
