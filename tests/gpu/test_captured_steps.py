"""What is captured gives the tokens of eager launches, at every overlap depth, and waits for nothing but older steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from fluentllm.local import LocalEngine

from .models import SMALL, engine, prompts, small, tokens_of

TEMPERATURES = (0.0, 0.8)


def run(local: LocalEngine, temperature: float) -> list[list[int]]:
    async def every() -> list[list[int]]:
        client = local.generation.client
        return await asyncio.gather(
            *(tokens_of(client, prompt, number, temperature) for number, prompt in enumerate(prompts(11, 300)))
        )

    return local.call(every())


@pytest.mark.parametrize("name", SMALL)
def test_captured_programs_give_the_tokens_of_eager_ones(name: str, tmp_path: Path) -> None:
    folder = small(name, tmp_path)
    with engine(folder, **{"engine.cuda_graphs": False, "engine.overlap_depth": 0}) as local:
        expected = [run(local, temperature) for temperature in TEMPERATURES]
    for depth in (0, 1, 2):
        with engine(folder, **{"engine.overlap_depth": depth}) as local:
            assert [run(local, temperature) for temperature in TEMPERATURES] == expected, depth
            assert len(local.engine.executor.programs._graphs), "nothing was captured"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_steady_decoding_never_waits_for_the_device(depth: int, tmp_path: Path) -> None:
    """The launch thread runs with every synchronisation an error, once its programs are captured."""
    with engine(small("qwen3-0.6b", tmp_path), **{"engine.overlap_depth": depth}) as local:
        run(local, 0.0)
        run(local, 0.0)
        try:
            local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("error")).result()
            assert all(run(local, 0.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")  # of the whole process, and the engine may have ended


@pytest.mark.parametrize("name", ["qwen3-0.6b", "deepseek-v3-lite"])
def test_what_an_idle_engine_captures_serves_those_who_come(name: str, tmp_path: Path) -> None:
    """Of all batches up to 16, with drafts where the model makes them: afterwards nothing else is captured, and no token is
    another."""
    drafts = {"speculative.method": "mtp", "speculative.k": 2, "speculative.min_acceptance": 0.0}
    settings = drafts if name == "deepseek-v3-lite" else {}
    folder = small(name, tmp_path)
    with engine(folder, **{"engine.capture_when_idle": False, **settings}) as local:
        expected = [run(local, temperature) for temperature in TEMPERATURES]
    with engine(folder, **settings) as local:
        for number, temperature in enumerate((*TEMPERATURES, TEMPERATURES[-1])):
            local.call(tokens_of(local.generation.client, [5, 6, 7], number, temperature, 4))
        local.call(local.engine.preparation.all(16))
        captured = local.engine.executor.programs._graphs._captured
        before = {key for key in captured if key[0] != "prefill"}
        assert {key[0] for key in before} >= {1, 2, 4, 8, 10, 12, 14, 16}
        assert [run(local, temperature) for temperature in TEMPERATURES] == expected
        assert {key for key in captured if key[0] != "prefill"} == before
