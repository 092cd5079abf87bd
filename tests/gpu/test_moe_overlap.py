"""LongCat's experts on a second stream inside the graph: the tokens of one stream, and nothing that waits for the device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fluentllm.local import LocalEngine

from .models import engine, prompts, small, tokens_of
from .watching import watch


def run(local: LocalEngine) -> list[list[int]]:
    async def every() -> list[list[int]]:
        client = local.generation.client
        wanted = enumerate(prompts(11, 300))
        return await asyncio.gather(*(tokens_of(client, prompt, number, 0.8 * (number % 2)) for number, prompt in wanted))

    return local.call(every())


@pytest.mark.parametrize("settings", [{}, {"engine.overlap_depth": 2}, {"engine.deterministic": True}], ids=str)
def test_tokens_are_those_of_one_stream(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = small("longcat-flash-lite", tmp_path)
    found = []
    for overlap in ("off", "on"):
        with engine(folder, **{"engine.moe_overlap": overlap, **settings}) as local:
            found.append([run(local) for _ in range(3)])  # eager, captured, replayed
            assert len(local.engine.executor.programs._graphs), "nothing was captured"
    assert found[0] == found[1]


def test_a_step_is_still_one_graph(tmp_path: Path) -> None:
    with engine(small("longcat-flash-lite", tmp_path), **{"engine.moe_overlap": "on"}) as local:
        watch(local, 3, 4)
        seen = watch(local, 3, 20)
    for counted in seen.calls:
        assert counted["cudaGraphLaunch"] == 1, counted
    assert seen.waiting() == {}
