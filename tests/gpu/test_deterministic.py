"""`engine.deterministic` on a GPU: whatever else runs, a request's tokens are those that it gets alone."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fluentllm.core.types import Request, SamplingParams
from fluentllm.local import LocalEngine

from .models import VOCABULARY, engine, small

REQUESTS, LONGEST = 64, 8000
CONTEXT = LONGEST + 100
NAMES = ("qwen3-0.6b", "deepseek-v3-lite", "longcat-flash-lite")


@dataclass(frozen=True)
class Job:
    number: int
    prompt: list[int]
    params: SamplingParams
    delay: float
    """Seconds until it comes."""
    leaves_after: int | None
    """Tokens after which its reader goes away."""


def jobs(seed: int) -> list[Job]:
    """Lengths from 1 to 8,000; a third begin as an earlier one does; a sixth are cancelled; half are greedy."""
    rng = random.Random(seed)
    made: list[Job] = []
    for number in range(REQUESTS):
        length = (1, LONGEST, 2, 4097)[number] if number < 4 else round(LONGEST ** rng.random())
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        if number > 4 and rng.random() < 0.35:
            shared = rng.choice(made).prompt
            prompt = (shared[: rng.randint(1, len(shared))] + prompt)[:LONGEST]
        params = SamplingParams(
            max_tokens=rng.randint(1, 60), temperature=0.0 if number % 2 else 0.9, seed=number, ignore_eos=True,
            top_p=rng.choice((1.0, 0.9)), top_k=rng.choice((0, 20)), presence_penalty=rng.choice((0.0, 0.3)),
        )  # fmt: skip
        cancelled = rng.random() < 1 / 6
        made.append(Job(number, prompt, params, rng.random() * 0.5, rng.randint(1, 10) if cancelled else None))
    return made


def crowd(pages: int, page_size: int) -> list[Job]:
    """Two that fill a pool of so many pages to the last, half a page short of its border each, and then go past theirs. They
    come first, so the second is there before the first comes to its border: then one of them must give way."""
    made = []
    for number, held in ((REQUESTS, pages // 2), (REQUESTS + 1, pages - pages // 2)):
        rng = random.Random(number)
        prompt = [rng.randrange(VOCABULARY) for _ in range(held * page_size - page_size // 2)]
        params = SamplingParams(max_tokens=page_size, temperature=0.9, seed=number, ignore_eos=True)
        made.append(Job(number, prompt, params, 0.0, None))
    return made


async def tokens_of(local: LocalEngine, job: Job, *, alone: bool) -> list[int]:
    if not alone:
        await asyncio.sleep(job.delay)
    found: list[int] = []
    request = Request(id=f"{job.number}-{alone}", prompt=job.prompt, params=job.params)
    async with aclosing(local.generation.client.submit(request)) as outputs:
        async for output in outputs:
            found += output.tokens
            if not alone and job.leaves_after is not None and len(found) >= job.leaves_after:
                break
    return found


async def one_by_one(local: LocalEngine, wanted: list[Job]) -> list[list[int]]:
    return [await tokens_of(local, job, alone=True) for job in wanted]


async def together(local: LocalEngine, wanted: list[Job]) -> list[list[int]]:
    return await asyncio.gather(*(tokens_of(local, job, alone=False) for job in wanted))


@pytest.mark.parametrize("name", NAMES)
def test_a_random_mix_of_requests_gives_each_what_it_gets_alone(name: str, tmp_path: Path) -> None:
    folder = small(name, tmp_path, max_position_embeddings=16384)
    settings: dict[str, Any] = {"engine.deterministic": True, "model.max_model_len": CONTEXT}
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with engine(folder, **settings, **{"kv.prefix_cache": False, "scheduler.prefill_tokens": 8192}) as local:
        kv, info = local.engine.kv, local.engine.info
        pages = kv.pages_for(CONTEXT)  # what the longest needs, and no more
        wanted = crowd(pages, kv.page_size) + jobs(seed)
        memory = pages * info.memory["kv_pool"] // (kv.pages_total + 1)
        expected = local.call(one_by_one(local, wanted))
    assert [len(tokens) for tokens in expected] == [job.params.max_tokens for job in wanted]
    assert len({tuple(tokens) for tokens in expected}) > REQUESTS // 2, "the model says the same to everybody"
    with engine(folder, **settings, **{"kv.memory": str(memory), "scheduler.prefill_tokens": 1000}) as local:
        assert local.engine.kv.pages_total == pages
        for _ in range(2):  # eagerly and captured, without a prefix cache to speak of and with one
            found = local.call(together(local, wanted))
            for job, tokens, alone in zip(wanted, found, expected, strict=True):
                whole = job.leaves_after is None
                assert tokens == (alone if whole else alone[: len(tokens)]), (job.number, len(job.prompt))
        stats = local.engine.stats()
        assert len(local.engine.executor.programs._graphs), "nothing was captured"
    assert stats.preemptions > 0, "two that do not fit together both ran to their end"


@pytest.mark.parametrize("method", ["pld", "mtp"])
def test_nor_does_speculation_change_it(method: str, tmp_path: Path) -> None:
    folder = small("deepseek-v3-lite", tmp_path, num_nextn_predict_layers=1)
    params = [SamplingParams(max_tokens=50, temperature=0.9 * (n % 2), seed=n, ignore_eos=True) for n in range(9)]
    wanted = [Job(n, [n, 7, 8] * 20, params[n], 0.0, None) for n in range(9)]
    with engine(folder, **{"engine.deterministic": True}) as local:
        expected = local.call(together(local, wanted))
    for depth in (0, 2):
        drafting = {"speculative.method": method, "speculative.k": 3, "engine.overlap_depth": depth}
        with engine(folder, **{"engine.deterministic": True, **drafting}) as local:
            assert local.call(together(local, wanted)) == expected


def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    """Experts included: every synchronisation is an error, once programs are captured."""
    wanted = jobs(1)[4:20]
    with engine(small("deepseek-v3-lite", tmp_path, max_position_embeddings=16384), **{"engine.deterministic": True}) as local:
        for _ in range(2):
            local.call(together(local, wanted))
        local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("error")).result()
        try:
            assert all(local.call(together(local, wanted)))
        finally:
            local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("default")).result()
