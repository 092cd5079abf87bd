"""A proposer that fails is switched off by name; the requests go on without it."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from engine.harness import Harness

from .proposers import Draft, plugins_with


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [rng.choices(range(3, 160), k=rng.randint(3, 30)) for _ in range(4)]


def failing(answer: Any, after: int) -> Draft:
    """Drafts token 5, and from the call `after` on does what `answer(slots, count)` does."""
    calls = 0

    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            return answer(slots, count)
        return torch.full((len(slots), count), 5), torch.full((len(slots),), count)

    return draft


def raises(slots: torch.Tensor, count: int) -> Any:
    raise ValueError("no head for this")


WRONG = {
    "raises": (raises, "it raised ValueError: no head for this"),
    "too_few": (lambda s, k: (torch.zeros(len(s), k + 1, dtype=torch.int64), torch.zeros(len(s), dtype=torch.int64)), "drafts"),
    "valid_shape": (lambda s, k: (torch.zeros(len(s), k, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)), "valid"),
    "floats": (lambda s, k: (torch.zeros(len(s), k), torch.zeros(len(s), dtype=torch.int64)), "torch.float32"),
    "a_list": (lambda s, k: ([0] * len(s), torch.zeros(len(s), dtype=torch.int64)), "returned list as drafts, not a tensor"),
    "nothing": (lambda s, k: None, "it raised TypeError"),
}


@pytest.mark.parametrize("after", [0, 6])
@pytest.mark.parametrize("kind", WRONG)
async def test_a_failing_proposer_is_off(tiny: Harness, kind: str, after: int, caplog: pytest.LogCaptureFixture) -> None:
    answer, said = WRONG[kind]
    async with tiny.engine(**{"speculative.method": "none"}) as running:
        expected = [await running.tokens(p, max_tokens=12, ignore_eos=True) for p in prompts()]
    plugins = plugins_with(failing(answer, after))
    settings = {"speculative.method": "test", "engine.overlap_depth": 1}
    with caplog.at_level(logging.ERROR):
        async with tiny.engine(plugins=plugins, **settings) as running:
            ids = [running.submit(p, max_tokens=12, ignore_eos=True) for p in prompts()]
            assert [await running.rest(i) for i in ids] == expected
            speculative = running.engine.stats().speculative
            assert speculative is not None
            drafted = list(speculative.drafted)
            assert (sum(drafted) > 0) == (after > 0)
            # Later requests are served, and nothing is drafted for them.
            assert await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True) == expected[0]
            speculative = running.engine.stats().speculative
            assert speculative is not None
            assert speculative.drafted == drafted
            assert said in (speculative.error or "")
    errors = [r.getMessage() for r in caplog.records if "switched off" in r.getMessage()]
    assert len(errors) == 1
    assert "proposer 'test' of plugin 'testing'" in errors[0]
    assert said in errors[0]


@pytest.mark.parametrize("token", [-7, 160, 2**40])
async def test_ids_outside_the_vocabulary_are_wrong_drafts(tiny: Harness, token: int) -> None:
    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        return torch.full((len(slots), count), token), torch.full((len(slots),), 99)

    async with tiny.engine(**{"speculative.method": "none"}) as running:
        expected = await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True)
    async with tiny.engine(plugins=plugins_with(draft), **{"speculative.method": "test"}) as running:
        assert await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True) == expected
        speculative = running.engine.stats().speculative
        assert speculative is not None
        assert speculative.drafted[0] > 0
        assert speculative.error is None
