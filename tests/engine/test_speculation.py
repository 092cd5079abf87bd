"""Speculation changes no token: whatever the proposer drafts, the answer is that of decoding one token at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import ProposerContext, Register

from .harness import Harness

Work = list[tuple[list[int], dict[str, Any]]]

FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.7, "seed": 12, "top_k": 12, "top_p": 0.8},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.3},
    {"temperature": 0.9, "seed": 5, "logit_bias": {9: 4.0}, "presence_penalty": 0.6, "min_tokens": 9},
    {"logprobs": 2, "temperature": 0.5, "seed": 1},
]


class Script:
    """Drafts for each history what a function of (history, count) says: a proposer that knows too much."""

    def __init__(self, context: ProposerContext, drafts: Callable[[list[int], int], list[int]]) -> None:
        self._tables = context.tables
        self._drafts = drafts

    def draft(self, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros(len(slots), count, dtype=torch.int64)
        valid = torch.zeros(len(slots), dtype=torch.int64)
        for row, slot in enumerate(slots.tolist()):
            history = self._tables.history[slot, : self._tables.length[slot]].tolist()
            found = self._drafts(history, count)[:count]
            out[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
            valid[row] = len(found)
        return out, valid


class ScriptPlugin:
    def __init__(self, drafts: Callable[[list[int], int], list[int]]) -> None:
        self._drafts = drafts

    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register("script", lambda context: Script(context, self._drafts))


def scripted(harness: Harness, drafts: Callable[[list[int], int], list[int]]) -> PluginManager:
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"script": ScriptPlugin(drafts)})


def work(count: int) -> Work:
    rng = random.Random(count)
    shared = rng.choices(range(3, 160), k=20)
    return [
        (
            [*shared[: rng.randint(0, 20)], *rng.choices(range(3, 160), k=rng.randint(1, 30))],
            {"max_tokens": rng.randint(1, 20), **FEATURES[i % len(FEATURES)]},
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def expected(exact: Harness) -> list[list[int]]:
    async def alone() -> list[list[int]]:
        async with exact.engine(**{"kv.prefix_cache": False, "engine.overlap_depth": 0}) as running:
            return [await running.tokens(tokens, **params) for tokens, params in work(14)]

    return asyncio.run(alone())


def oracle(answers: list[list[int]]) -> Callable[[list[int], int], list[int]]:
    """Always right: continues every history as the model will."""
    whole = [[*tokens, *answer] for (tokens, _), answer in zip(work(14), answers, strict=True)]

    def drafts(history: list[int], count: int) -> list[int]:
        for text in whole:
            if text[: len(history)] == history and len(text) > len(history):
                return text[len(history) : len(history) + count]
        return []

    return drafts


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", ["right", "wrong", "wrong_at_2", "pld"])
async def test_no_draft_changes_a_token(exact: Harness, expected: list[list[int]], depth: int, kind: str) -> None:
    right = oracle(expected)

    def wrong(history: list[int], count: int) -> list[int]:
        return [(token + 1) % 160 for token in right(history, count)]

    def wrong_at_2(history: list[int], count: int) -> list[int]:
        drafts = right(history, count)
        return [*drafts[:2], *((t + 1) % 160 for t in drafts[2:3]), *drafts[3:]]

    scripts = {"right": right, "wrong": wrong, "wrong_at_2": wrong_at_2}
    plugins = scripted(exact, scripts[kind]) if kind in scripts else exact.plugins
    page_bytes = exact.page_bytes(16)
    for k in (1, 3, 5):
        settings = {
            "speculative.method": kind if kind == "pld" else "script",
            "speculative.k": k,
            "speculative.max_k": k,
            "engine.overlap_depth": depth,
            "scheduler.max_running": 6,
            "scheduler.prefill_tokens": 24,
            "model.max_model_len": 128,
            "kv.memory": str(14 * page_bytes),
        }
        async with exact.engine(plugins=plugins, **settings) as running:
            ids = [running.submit(tokens, **params) for tokens, params in work(14)]
            outputs = [await running.outputs(i) for i in ids]
            assert [[t for o in found for t in o.tokens] for found in outputs] == expected
            drafted = sum(o.drafted for found in outputs for o in found)
            accepted = sum(o.accepted for found in outputs for o in found)
            if kind == "right":
                assert 0 < accepted <= drafted
                # Each output brings its accepted drafts and the target's own token, or ends within the drafts.
                assert all(len(o.tokens) in (o.accepted, o.accepted + 1) for found in outputs for o in found)
                assert max(o.accepted for found in outputs for o in found) == k
            elif kind == "wrong":
                assert accepted == 0 < drafted
            elif kind == "wrong_at_2":
                assert max(o.accepted for found in outputs for o in found) == min(k, 2)
            for (_, params), found in zip(work(14), outputs, strict=True):
                wants = params.get("logprobs") is not None
                assert all((len(o.logprobs or []) == len(o.tokens)) if wants else o.logprobs is None for o in found)


async def test_auto_finds_out_what_pays(exact: Harness) -> None:
    """Times are the machine's, so only the choice's inputs are checked: right drafts are seen to survive, wrong ones not."""
    prompt = random.Random(3).choices(range(3, 160), k=20)
    async with exact.engine() as running:
        answer = await running.tokens(prompt, max_tokens=120, ignore_eos=True)

    def right(history: list[int], count: int) -> list[int]:
        return [*prompt, *answer][len(history) : len(history) + count]

    for script, survival in ((right, 1.0), (lambda history, count: [0] * count, 0.0)):
        settings = {"speculative.method": "script", "speculative.max_k": 2}
        async with exact.engine(plugins=scripted(exact, script), **settings) as running:
            assert await running.tokens(prompt, max_tokens=120, ignore_eos=True) == answer
            lengths = running.engine.draft_length
            assert lengths is not None
            assert lengths.acceptance.tokens({}, 2) == pytest.approx(1 + 2 * survival, abs=0.7)


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"speculative.k": 3}, "speculative.k 3"),
        ({"speculative.model": "folder"}, "speculative.model 'folder'"),
        ({"speculative.k": 0}, None),
        ({}, None),
    ],
)
def test_drafts_that_nobody_makes_are_warned_of(
    exact: Harness, caplog: pytest.LogCaptureFixture, given: dict[str, Any], idle: str | None
) -> None:
    from fluentllm.assembly.proposers import check_speculation
    from fluentllm.core.protocols import DraftTarget

    settings, spec = exact.settings(**given), exact.loaded.model.spec
    check_speculation(settings, spec, exact.plugins, DraftTarget(settings, spec, 4))
    assert [record.message for record in caplog.records] == (
        [f"{idle} has no effect: speculative.method is none, so nothing drafts; --speculative chooses"] if idle else []
    )
