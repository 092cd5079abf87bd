"""A proposer that fails is switched off by name; the requests go on without it."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from typing import Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.rehearsal import Largest, plans

from .proposers import Draft, Proposing, plugins_offering, plugins_with


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


def exits(slots: torch.Tensor, count: int) -> Any:
    sys.exit(3)


def cancels(slots: torch.Tensor, count: int) -> Any:
    raise asyncio.CancelledError


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def behaving_badly(slots: torch.Tensor, count: int) -> Any:
    """Looks like what is wanted, and is of no use: the type is fine, the operations are not."""

    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "clamp":
                raise RuntimeError("no such operation")
            return super().__torch_function__(func, types, args, kwargs or {})

    return zeros(len(slots), count).as_subclass(Odd), zeros(len(slots))


WRONG = {
    "raises": (raises, "it raised ValueError: no head for this"),
    "exits": (exits, "it raised SystemExit: 3"),
    "cancels": (cancels, "it raised CancelledError"),
    "too_few": (lambda s, k: (zeros(len(s), k + 1), zeros(len(s))), "drafts"),
    "valid_shape": (lambda s, k: (zeros(len(s), k), zeros(2, 2)), "valid"),
    "floats": (lambda s, k: (torch.zeros(len(s), k), zeros(len(s))), "torch.float32"),
    "nan": (lambda s, k: (torch.full((len(s), k), torch.nan), zeros(len(s))), "torch.float32"),
    "int32": (lambda s, k: (zeros(len(s), k).int(), zeros(len(s))), "torch.int32"),
    "sparse": (lambda s, k: (zeros(len(s), k).to_sparse(), zeros(len(s))), "torch.sparse_coo"),
    "sparse_valid": (lambda s, k: (zeros(len(s), k), zeros(len(s)).to_sparse()), "torch.sparse_coo"),
    "elsewhere": (lambda s, k: (zeros(len(s), k).to("meta"), zeros(len(s))), "on meta"),
    "badly": (behaving_badly, "it raised RuntimeError: no such operation"),
    "a_list": (lambda s, k: ([0] * len(s), zeros(len(s))), "returned list as drafts, not a tensor"),
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


async def test_memory_that_drafts_lack_is_what_a_rehearsal_must_hear_of(tiny: Harness) -> None:
    """A pool that was sized without them would leave none for them."""

    def hungry(slots: torch.Tensor, count: int) -> Any:
        raise torch.OutOfMemoryError("no room for drafts")

    plugins = plugins_with(failing(hungry, after=0))
    steps = plans(Largest(prefill_tokens=16, sequences=2, context=64, drafts=1))
    async with tiny.engine(plugins=plugins, **{"speculative.method": "test", "speculative.k": 1}) as running:
        executor = running.engine.executor
        executor.programs.rehearses = True
        with pytest.raises(torch.OutOfMemoryError, match="no room for drafts"):
            executor.launch(steps[0]).result()
        executor.programs.rehearses = False
        assert await running.tokens(prompts()[0], max_tokens=3, ignore_eos=True)
        speculative = running.engine.stats().speculative
        assert speculative is not None
        assert speculative.error == "proposer 'test' of plugin 'testing': it raised OutOfMemoryError: no room for drafts"


async def test_a_proposer_whose_method_is_gone_is_off(tiny: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """It had one at the start."""

    class Leaving(Proposing):
        @property
        def draft(self) -> Any:
            batches.append(1)
            if len(batches) > 4:
                raise AttributeError("no draft any more")
            return super().draft

    batches: list[int] = []
    plugins = plugins_offering(lambda context: Leaving(context, failing(raises, after=100)))
    async with tiny.engine(**{"speculative.method": "none"}) as running:
        expected = await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True)
    with caplog.at_level(logging.ERROR):
        async with tiny.engine(plugins=plugins, **{"speculative.method": "test"}) as running:
            assert await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True) == expected
            speculative = running.engine.stats().speculative
    assert speculative is not None
    assert speculative.error == "proposer 'test' of plugin 'testing': it raised AttributeError: no draft any more"
    assert speculative.drafted[0] > 0
    assert "proposer 'test' of plugin 'testing' is switched off: it raised AttributeError" in caplog.text


@pytest.mark.parametrize("valid", [99, -1, 2**40])
@pytest.mark.parametrize("token", [-7, 160, 2**40])
async def test_ids_outside_the_vocabulary_are_wrong_drafts(tiny: Harness, token: int, valid: int) -> None:
    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        return torch.full((len(slots), count), token), torch.full((len(slots),), valid)

    async with tiny.engine(**{"speculative.method": "none"}) as running:
        expected = await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True)
    async with tiny.engine(plugins=plugins_with(draft), **{"speculative.method": "test"}) as running:
        assert await running.tokens(prompts()[0], max_tokens=12, ignore_eos=True) == expected
        speculative = running.engine.stats().speculative
        assert speculative is not None
        assert (speculative.drafted[0] > 0) == (valid > 0)
        assert speculative.error is None
