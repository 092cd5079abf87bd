"""MLA with a draft layer: its KV and its page states go along, so that decode drafts at once, and as one engine does. So it is
over an FP8 cache, whose pages are planes of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.harness import Harness
from speculation import eagle, mtp
from torch import Tensor

from fluentllm.core.engine import Engine

from .pair import pair
from .test_handoff import ALONE, FALLBACKS

PROMPTS = [[(11 * i + 5 * p) % 150 + 3 for i in range(length)] for p, length in enumerate((1, 8, 9, 21, 40))]
"""Pages have 8 tokens, 16 in an FP8 cache."""
FP8 = {"kv.dtype": "fp8", "kv.page_size": 16}
PARAMS: list[dict[str, Any]] = [{"max_tokens": 14}, {"max_tokens": 14, "temperature": 0.8, "seed": 3}]


def drafts_of(engine: Engine) -> dict[tuple[int, ...], list[int]]:
    """History → what was drafted behind it; fills as the engine runs."""
    programs: Any = engine.executor.programs
    found: dict[tuple[int, ...], list[int]] = {}

    def record(call: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def recorded(*arguments: Any) -> tuple[Tensor, Tensor]:
            drafts, valid = call(*arguments)
            tables, slots = programs.tables, arguments[-2]
            for slot, row in zip(slots.tolist(), drafts.tolist(), strict=True):
                if row and not tables.finished[slot]:
                    found[tuple(tables.history[slot, : tables.length[slot]].tolist())] = row
            return drafts, valid

        return recorded

    for name in ("draft", "resume"):
        setattr(programs.proposer, name, record(getattr(programs.proposer, name)))
    return found


@pytest.fixture(scope="module")
def longcat(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder: Path = mtp.write_checkpoint(tmp_path_factory.mktemp("handoff-mtp"), mtp.CONFIGS["longcat"])
    return Harness(
        folder,
        **{
            "model.load_format": "safetensors",
            "engine.deterministic": True,
            "kv.page_size": 8,
            "speculative.method": "mtp",
            "speculative.k": 3,
            "disaggregation.role": "prefill",
            "disaggregation.transport": "loopback",
        },
    )


@pytest.mark.parametrize("cache", [{}, FP8], ids=["float32", "fp8"])
async def test_tokens_and_drafts_are_those_of_one_engine(longcat: Harness, cache: dict[str, Any]) -> None:
    jobs = [(prompt, params) for prompt in (PROMPTS[::2] if cache else PROMPTS) for params in PARAMS]
    async with longcat.engine(**ALONE, **cache) as engine:
        drafted = drafts_of(engine.engine)
        expected = [await engine.outputs(engine.submit(prompt, **params)) for prompt, params in jobs]
    async with pair(longcat, **{"scheduler.prefill_tokens": 16}, **cache) as both:
        assert both.layout.dtype == ("float8_e4m3fn" if cache else "float32")
        found = drafts_of(both.decode.engine)
        for (prompt, params), whole in zip(jobs, expected, strict=True):
            outputs = await both.outputs(prompt, **params)
            report = outputs[0].handoff
            assert report is not None
            assert report.received_bytes == both.layout.bytes_of(len(prompt)) - report.saved_bytes
            # Step by step: the same tokens, the same drafts, the same of them accepted, from the first decode on.
            steps = [(output.tokens, output.drafted, output.accepted) for output in outputs]
            assert steps == [(output.tokens, output.drafted, output.accepted) for output in whole]
            assert steps[1][1] == 3
        assert found == drafted
        stats = both.decode.stats
        assert {name: stats.get(name, 0) for name in FALLBACKS} == dict.fromkeys(FALLBACKS, 0)
        assert both.decode.engine.executor.programs.prefilled == 0  # type: ignore[attr-defined]


async def test_many_at_once(longcat: Harness) -> None:
    jobs = [(prompt, params) for prompt in PROMPTS for params in PARAMS]
    async with longcat.engine(**ALONE) as engine:
        expected = [await engine.tokens(prompt, **params) for prompt, params in jobs]
    async with pair(longcat, **{"scheduler.prefill_tokens": 16}) as both:
        assert await asyncio.gather(*(both.tokens(prompt, **params) for prompt, params in jobs)) == expected


async def test_choices_of_one_prompt_while_clients_leave(longcat: Harness) -> None:
    """Pages, draft layers' and page states' of those who left are free, or the pair does not close."""
    choices = [{**PARAMS[1], "seed": seed} for seed in range(4)]
    async with longcat.engine(**ALONE) as engine:
        expected = [await engine.tokens(PROMPTS[4], **params) for params in choices]
    async with pair(longcat, **{"scheduler.prefill_tokens": 16}) as both:

        async def leave(turns: int) -> None:
            first, second = both.submit([*PROMPTS[4], 3 + turns], max_tokens=60)
            for _ in range(turns):
                await asyncio.sleep(0.001)
            both.decode.connection.abort([second])
            if turns % 3:
                both.prefill.connection.abort([first])

        leaving = [asyncio.create_task(leave(turns)) for turns in (0, 1, 2, 4, 8, 16, 32, 64)]
        assert await asyncio.gather(*(both.tokens(PROMPTS[4], **params) for params in choices)) == expected
        await asyncio.gather(*leaving)


@pytest.mark.parametrize("cache", [{}, FP8], ids=["float32", "fp8"])
async def test_a_turn_after_a_turn(longcat: Harness, cache: dict[str, Any]) -> None:
    """The second prompt's prefix, answer and all, is decode's own work; the page states of both engines meet in it."""
    async with longcat.engine(**ALONE, **cache) as engine:
        drafted = drafts_of(engine.engine)
        first = await engine.tokens(PROMPTS[4], **PARAMS[0])
        second = [*PROMPTS[4], *first, 5, 6, 7, 8, 9]
        whole = await engine.outputs(engine.submit(second, **PARAMS[0]))
    async with pair(longcat, **cache) as both:
        found = drafts_of(both.decode.engine)
        await both.outputs(PROMPTS[4], **PARAMS[0])
        outputs = await both.outputs(second, **PARAMS[0])
        assert [(o.tokens, o.drafted, o.accepted) for o in outputs] == [(o.tokens, o.drafted, o.accepted) for o in whole]
        assert outputs[0].cached_tokens == 48
        assert found == drafted


async def test_a_draft_model_with_a_pool_of_its_own(tmp_path: Path) -> None:
    """EAGLE-3 on a Llama: its KV has another shape than the target's, and goes along page by page."""
    handed = {"disaggregation.role": "prefill", "disaggregation.transport": "loopback", "speculative.k": 3}
    model, copy = (eagle.harness(tmp_path, "eagle3", "llama", **handed) for _ in range(2))
    jobs = [(prompt, params) for prompt in PROMPTS[2:] for params in PARAMS]
    async with model.engine(**ALONE) as engine:
        drafted = drafts_of(engine.engine)
        expected = [await engine.outputs(engine.submit(prompt, **params)) for prompt, params in jobs]
    async with pair(model, copy, **{"scheduler.prefill_tokens": 16}) as both:
        assert len(both.layout.page_states) == 3
        found = drafts_of(both.decode.engine)
        for (prompt, params), whole in zip(jobs, expected, strict=True):
            outputs = await both.outputs(prompt, **params)
            steps = [(output.tokens, output.drafted, output.accepted) for output in outputs]
            assert steps == [(output.tokens, output.drafted, output.accepted) for output in whole]
            assert steps[1][1] == 3
        assert found == drafted


@pytest.mark.parametrize("error", [ValueError, SystemExit])
async def test_a_proposer_that_cannot_go_on_is_off(longcat: Harness, error: type[BaseException]) -> None:
    """`resume` fails for the first prompt that is handed over: it and later ones decode without drafts."""

    def fails(*_: Any) -> Any:
        raise error("not with this prompt")

    async with longcat.engine(**ALONE) as engine:
        expected = [await engine.tokens(prompt, **PARAMS[0]) for prompt in PROMPTS[3:]]
    async with pair(longcat) as both:
        programs: Any = both.decode.engine.executor.programs
        programs.proposer.resume = fails
        assert [await both.tokens(prompt, **PARAMS[0]) for prompt in PROMPTS[3:]] == expected
        speculative = both.decode.engine.stats().speculative
    assert speculative is not None
    assert speculative.error == f"proposer 'mtp' of plugin 'spec_mtp': it raised {error.__name__}: not with this prompt"
    assert sum(speculative.drafted) == 0
