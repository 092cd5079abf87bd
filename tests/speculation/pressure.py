"""Everything at once that may disturb a proposer with a layer of its own: chunks, prefix hits, preemptions, steps that draft
fewer or nothing."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from .watching import Drafted, anything, half_right, watched

if TYPE_CHECKING:
    from engine.harness import Harness, Running

    from fluentllm.core.types import RequestOutput

Work = list[tuple[list[int], dict[str, Any]]]
"""Prompts, and their sampling parameters."""


def work(count: int = 6) -> Work:
    rng = random.Random(4)
    shared = rng.choices(range(3, 160), k=40)
    return [
        (
            [*shared[: (8, 16, 23, 40, 33, 40)[i]], *rng.choices(range(3, 160), k=rng.randint(1, 9))],
            {"max_tokens": 18 + i, "ignore_eos": True, "temperature": (0, 0.8)[i % 2], "seed": i},
        )
        for i in range(count)
    ]


class Case:
    """A model, its answers without speculation, and its drafts from scratch."""

    def __init__(self, model: Harness, reference: Any, page_bytes: int) -> None:
        """`page_bytes`: of all that is kept of a page while drafts are made."""
        self.model, self.reference, self.page_bytes = model, reference, page_bytes
        self.answers = asyncio.run(self._alone())
        self.texts = [[*prompt, *answer] for (prompt, _), answer in zip(work(), self.answers, strict=True)]
        for text in self.texts:
            reference.prime(text)

    async def _alone(self) -> list[list[int]]:
        plain = {"kv.prefix_cache": False, "engine.overlap_depth": 0, "speculative.method": "none"}
        async with self.model.engine(**plain) as running:
            return [await running.tokens(tokens, **params) for tokens, params in work()]


async def under_pressure(case: Case, method: str, k: int, depth: int, **settings: Any) -> None:
    """All drafts are the reference's, whatever is verified instead of them, and all tokens those without drafts."""
    record: list[Drafted] = []
    tight = {
        "speculative.method": "watched",
        "speculative.k": k,
        "engine.overlap_depth": depth,
        "scheduler.prefill_tokens": 21,
        "scheduler.max_running": 6,
        "model.max_model_len": 80,
        "kv.memory": str(17 * case.page_bytes),
    }
    async with case.model.engine(plugins=watched(method, record, half_right(case.texts)), **tight, **settings) as running:
        lengths = running.engine.draft_length
        assert lengths is not None
        lengths.choose = anything(random.Random(k), k)  # type: ignore[method-assign]
        outputs = await all_and_again(running, work(), case.answers, again=3, cached=32)
        assert max(o.accepted for found in outputs.values() for o in found) == k
    only = sum(drafted.check(case.reference) for drafted in record)
    drafts = sum(len(drafted.drafts) for drafted in record)
    assert only > 0.95 * drafts > 50
    assert any(not drafted.drafts for drafted in record)


async def all_and_again(
    running: Running, requests: Work, expected: list[list[int]], *, again: int, cached: int
) -> dict[str, list[RequestOutput]]:
    """All requests at once, some of which are preempted, then one of them again, of which so many tokens are in the cache: the
    tokens expected → what the first ones got, by id."""
    ids = [running.submit(prompt, **params) for prompt, params in requests]
    outputs = [await running.outputs(i) for i in ids]
    assert [[t for o in found for t in o.tokens] for found in outputs] == expected
    assert running.engine.stats().preemptions > 0
    prompt, params = requests[again]
    found = await running.outputs(running.submit(prompt, **params))
    assert [t for o in found for t in o.tokens] == expected[again]
    assert found[0].cached_tokens >= cached
    return dict(zip(ids, outputs, strict=True))
