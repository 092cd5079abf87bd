"""Proposer × K × overlap depth × batch × situation, and every feature: no token changes, and every draft is accounted for.

By default a covering set of cells is run, in which every pair of two axes' values occurs, each with the proposer's own drafts
and one of the other strategies; everything by

    pytest tests/speculation/test_lossless.py -m full

or, in pieces that go on where the last one stopped, by `python -m speculation.matrix` (see there).
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest
from structured.conftest import needs_xgrammar

from . import answers
from .answers import ANSWERS, Answer
from .features import FEATURES, Asked, asked, differences, plugins_with
from .lossless import ALL, METHODS, STRATEGIES, Cell, Strategy, Subject, check, check_captured, covering, subject
from .report import MATRIX, PAGE, Report, with_matrix

if TYPE_CHECKING:
    from pathlib import Path

COVERING = sorted(covering(), key=lambda cell: (-cell.k, -cell.batch))
AXES = {
    "Drafts a step": [f"K = {k}" for k in (1, 2, 3, 4, 5)],
    "Steps launched ahead": [f"overlap depth {depth}" for depth in (0, 1, 2)],
    "Requests at once": [f"batch {batch}" for batch in (1, 7, 32)],
    "Situations": ["plain", "prefix hit", "preempted", "chunked prefill"],
}
ROWS = {"Features of a request": list(FEATURES), "Answers of the API": list(ANSWERS), **AXES}
made: dict[str, Subject] = {}
requests_of: dict[str, list[Asked]] = {}
answers_of: dict[str, tuple[list[Answer], list[list[int]]]] = {}
report = Report()


@pytest.fixture
def tested(method: str, tmp_path: Path) -> Subject:
    """Made once for each method."""
    if method not in made:
        made[method] = subject(tmp_path, method)
    return made[method]


def note(method: str, cell: Cell, equal: bool) -> None:
    values = (f"K = {cell.k}", f"overlap depth {cell.depth}", f"batch {cell.batch}", cell.situation)
    for section, value in zip(AXES, values, strict=True):
        report.saw(section, value, method, equal)


@pytest.mark.parametrize("number", range(len(COVERING)), ids=[str(cell) for cell in COVERING])
@pytest.mark.parametrize("method", METHODS)
async def test_covering_cells(tested: Subject, method: str, number: int) -> None:
    equal = False
    try:
        for strategy in ("own", STRATEGIES[1 + number % 3]):
            await check(tested, COVERING[number], strategy)
        equal = True
    finally:
        note(method, COVERING[number], equal)


@pytest.mark.full
@pytest.mark.parametrize("cell", sorted(ALL, key=lambda cell: (-cell.k, -cell.batch)), ids=str)
@pytest.mark.parametrize("method", METHODS)
async def test_every_cell(tested: Subject, cell: Cell) -> None:
    for strategy in STRATEGIES:
        await check(tested, cell, strategy)


@pytest.mark.parametrize("method", METHODS)
async def test_drafts_that_are_recorded_inside_the_program(tested: Subject, method: str) -> None:
    """As on a GPU, where programs are captured."""
    assert await check_captured(tested, Cell(3, 1, 7, "preempted")) > 0


def test_the_covering_set_covers() -> None:
    assert len(COVERING) < 30
    for axis in ("k", "depth", "batch", "situation"):
        assert {getattr(cell, axis) for cell in COVERING} == {getattr(cell, axis) for cell in ALL}


# ------------------------------------------------------------------------------------------------------------------ features
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
async def test_features(tested: Subject, method: str, depth: int) -> None:
    """All in one batch. A draft that repeats one token, stop ids and budgets inside of drafts are among them."""
    if method not in requests_of:
        requests_of[method] = await asked(tested)
    work = requests_of[method]
    wrong: dict[str, list[str]] = {name: [] for name in FEATURES}
    for strategy in ("right", "repeat", *(("own",), ("wrong at j",), ())[depth]):
        doctor = Strategy(strategy, 4, [each.text for each in work])
        settings = {
            "speculative.method": "watched",
            "speculative.k": 4,
            "speculative.min_acceptance": 0.0,
            "engine.overlap_depth": depth,
            "scheduler.max_running": 12,
            "model.max_model_len": 64,
            "grammar.states": 8,
        }
        async with tested.model.engine(plugins=plugins_with(tested.method, doctor), **settings) as running:
            ids = [running.submit(each.prompt, **each.params) for each in work]
            found = [await running.outputs(i) for i in ids]
            stats = running.engine.stats().speculative
        assert stats is not None
        assert stats.error is None
        if strategy == "right":
            assert sum(stats.accepted) > 0.6 * sum(stats.drafted)
        for each, outputs in zip(work, found, strict=True):
            wrong[each.feature] += [f"{strategy}: {name}" for name in differences(each, outputs)]
    reported("Features of a request", method, wrong)


def reported(table: str, method: str, wrong: dict[str, list[str]]) -> None:
    """In the page's table, each feature with what was wrong with it; and nothing was."""
    for feature, what in wrong.items():
        report.saw(table, feature, method, not what)
    assert not {feature: what for feature, what in wrong.items() if what}


def test_the_requests_use_their_features() -> None:
    """Stops end answers, budgets cut them, penalties and grammars change them."""
    if not requests_of:
        pytest.skip("the tests of features were not run")
    for work in requests_of.values():
        by = {each.feature: each for each in work}
        ends = {feature: each.found[-1].finish_reason for feature, each in by.items()}
        assert ends["stop id inside a draft"] == "stop"
        assert ends["max_tokens inside a draft"] == ends["greedy"] == "length"
        assert by["logprobs"].found[0].logprobs
        assert by["prompt_logprobs"].found[0].prompt_logprobs
        late = by["min_tokens"]
        stop = late.params["stop_token_ids"][0]
        assert stop == late.text[len(late.prompt) + 3]
        assert stop not in [token for output in late.found for token in output.tokens][:7]
        assert ends["end of sequence"] == "stop"
        forbidden = by["logit_bias of -100"]
        assert not forbidden.params["logit_bias"].keys() & set(forbidden.text[len(forbidden.prompt) :])


# ------------------------------------------------------------------------------------------------------------------- answers
@needs_xgrammar
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
async def test_answers(tested: Subject, method: str, depth: int) -> None:
    """All at once, whole and streamed, behind the API."""
    if method not in answers_of:
        answers_of[method] = await answers.answered(tested)
    made_of, texts = answers_of[method]
    wrong: dict[str, list[str]] = {name: [] for name in ANSWERS}
    for strategy in (("right",), ("own",), ("right", "wrong at j"))[depth]:
        for feature, what in (await answers.differences(tested, made_of, Strategy(strategy, 4, texts), depth)).items():
            wrong[feature] += [f"{strategy}: {one}" for one in what]
    reported("Answers of the API", method, wrong)


def test_the_answers_use_their_features() -> None:
    """Stop strings end them, choices differ, texts are what they must be, calls are made."""
    if not answers_of:
        pytest.skip("the tests of answers were not run")
    for made_of, _ in answers_of.values():
        by = {feature: [each for each in made_of if each.feature == feature] for feature in ANSWERS}
        for each in by["stop strings"]:
            assert each.reasons == ["stop"]
            assert each.whole["usage"]["completion_tokens"] > 1
        [late] = by["stop strings, min_tokens"]
        assert late.whole["usage"]["completion_tokens"] >= 9
        assert any(stop in late.texts[0] for stop in late.body["stop"])
        for each, count in zip(by["n above 1"], (3, 1, 2), strict=True):
            assert len(set(each.texts)) == count
        assert len(set(by["several prompts"][0].texts)) == 4
        assert all(each.texts[0].startswith(answers.TEXT) for each in by["echo"])
        assert by["echo"][2].texts[0] == answers.TEXT
        for name, pattern in answers.PATTERNS.items():
            ends = [(text, reason) for each in by[name] for text, reason in zip(each.texts, each.reasons, strict=True)]
            texts = [text for text, reason in ends if reason == "stop"]
            assert texts or name == "structured outputs: JSON object", name  # which need not come to an end
            assert all(re.fullmatch(pattern, text) for text in texts)
        for name in ("tools: a call is required", "tools: a named call", "tools: one call at most"):
            assert any("tool_calls" in choice["message"] for each in by[name] for choice in each.whole["choices"])
        assert by["reasoning"][0].whole["choices"][0]["message"]["reasoning_content"]


def test_the_page_says_what_was_found() -> None:
    """Last: it needs the others' findings."""
    if not report.complete(ROWS):
        pytest.skip("only some of the tests were run")
    text = with_matrix(report.text(ROWS), json.loads(MATRIX.read_text()))
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "write it with UPDATE_DOCS=1"
