"""Programs that are captured ahead run for nobody: what was in the slots, and what comes next, is what it is without."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import pytest

from fluentllm.core import preparation
from fluentllm.core.preparation import Preparation
from fluentllm.core.types import Drafting

from .harness import Harness, Running
from .test_speculation import scripted

PROMPTS = [[3 + (7 * i + j) % 150 for j in range(length)] for i, length in enumerate((40, 5, 33))]
PARAMS: list[dict[str, Any]] = [{"max_tokens": 30}, {"max_tokens": 20, "temperature": 1.0, "seed": 5}, {"max_tokens": 25}]


class Replayed:
    """In place of `core.graphs.Graphs`, which needs a GPU: runs each program kernel by kernel, and counts."""

    def __init__(self) -> None:
        self.runs: Counter[Hashable] = Counter()

    def ready(self, key: Hashable) -> bool:
        return self.runs[key] > 1

    def run(self, key: Hashable, program: Callable[[], Any]) -> Any:
        self.runs[key] += 1
        return program()

    def clear(self) -> None:
        self.runs.clear()


async def answers(running: Running) -> list[list[int]]:
    ids = [running.submit(prompt, ignore_eos=True, **given) for prompt, given in zip(PROMPTS, PARAMS, strict=True)]
    return list(await asyncio.gather(*map(running.rest, ids)))


@pytest.mark.parametrize("method", ["none", "pld"])
async def test_an_idle_engine_captures_and_nothing_changes(
    exact: Harness, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "REST", 0.05)
    async with exact.engine() as running:
        expected = await answers(running)
    drafting = [Drafting(), Drafting(2, 2)] if method == "pld" else [Drafting()]
    async with exact.engine(**{"speculative.method": method, "speculative.k": 2, "scheduler.max_running": 4}) as running:
        programs = running.engine.executor.programs
        graphs = Replayed()
        monkeypatch.setattr(programs, "_graphs", graphs)
        running.engine.preparation = Preparation(running.engine.executor.prepare, 4, drafting)
        assert await answers(running) == expected
        tables = running.engine.executor.tables
        before = [tables.history.clone(), tables.ints.clone(), tables.finished.clone(), tables.output_counts.clone()]
        while running.engine.preparation.next() is not None:
            await asyncio.sleep(0.02)
        for now, then in zip((tables.history, tables.ints, tables.finished, tables.output_counts), before, strict=True):
            assert now[:4].equal(then[:4]), "it wrote to a slot"
        features = {key[3] for key in graphs.runs}  # type: ignore[index]
        assert {key[:3] for key in graphs.runs} >= {(b, d.verify, d.draft) for b in (1, 2, 4) for d in drafting}  # type: ignore[index]
        known = set(graphs.runs)
        assert all(graphs.ready(key) for key in known)
        assert await answers(running) == expected
        assert {key for key in graphs.runs if key[3] in features} == known, "a step met a program that was not ready"  # type: ignore[index]


async def test_without_its_proposer_an_engine_captures_anew(exact: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured goes with a proposer that fails: plain programs are captured again, and no others."""
    monkeypatch.setattr(preparation, "REST", 0.05)
    broken = False

    def drafts(history: list[int], count: int) -> list[int]:
        if broken:
            raise ValueError("out of ideas")
        return [5] * count

    settings = {"speculative.method": "script", "speculative.k": 2, "scheduler.max_running": 4}
    async with exact.engine(plugins=scripted(exact, drafts), **settings) as running:
        engine, graphs = running.engine, Replayed()
        monkeypatch.setattr(engine.executor.programs, "_graphs", graphs)
        engine.preparation = Preparation(engine.executor.prepare, 4, [Drafting(), Drafting(2, 2)])
        expected = await answers(running)
        await _prepared(engine.preparation)
        broken = True
        assert await answers(running) == expected
        stats = engine.stats().speculative
        assert stats is not None
        assert stats.error is not None
        assert engine.preparation.next() is not None, "nothing of what was ready is"
        steps = set(graphs.runs)
        await _prepared(engine.preparation)
        assert all(graphs.ready((bucket, 0, 0, key[3])) for key in graphs.runs for bucket in (1, 2, 4))  # type: ignore[index]
        assert not [key for key in set(graphs.runs) - steps if key[1] or key[2]], "nobody drafts any more"  # type: ignore[index]


async def _prepared(work: Preparation) -> None:
    async with asyncio.timeout(60):
        while work.next() is not None:
            await asyncio.sleep(0.02)
