"""Speculation under capture, outside deterministic mode: the tokens do not depend on the overlap depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluentllm.local import LocalEngine

from .models import engine, small, tokens_of


async def answers(local: LocalEngine) -> list[list[int]]:
    """One at a time, so that all depths have the same batches: products of other sizes round otherwise."""
    client = local.generation.client
    texts = [[n, 7, 8, 9] * 20 for n in range(6)]  # prompts that repeat, so that lookup drafts
    return [await tokens_of(client, prompt, number, 0.8 * (number % 2)) for number, prompt in enumerate(texts)]


@pytest.mark.parametrize(("name", "method"), [("qwen3-0.6b", "pld"), ("deepseek-v3-lite", "pld"), ("deepseek-v3-lite", "mtp"),
                                              ("longcat-flash-lite", "mtp")])  # fmt: skip
def test_every_depth_gives_the_same_tokens(name: str, method: str, tmp_path: Path) -> None:
    folder = small(name, tmp_path)
    found = []
    for depth in (0, 1, 2):
        settings = {"speculative.method": method, "speculative.k": 3, "speculative.min_acceptance": 0.0}
        with engine(folder, **settings, **{"engine.overlap_depth": depth, "kv.prefix_cache": False}) as local:
            found.append([local.call(answers(local)) for _ in range(2)])
            assert len(local.engine.executor.programs._graphs), "nothing was captured"
    assert found[1] == found[0]
    assert found[2] == found[0]
