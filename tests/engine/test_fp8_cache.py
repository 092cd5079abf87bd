"""Engines over an FP8 cache, MLA's and that of grouped heads: batches, chunks, prefix hits, preemptions and drafts change no
token, and memory is what the format says."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from speculation import mtp

from fluentllm.core.errors import ConfigError
from fluentllm.core.kv.pool import KVPool

from .harness import Harness, write_tiny_llama
from .test_every_model import MODELS, TINY_LLAMA

FP8 = {"kv.dtype": "fp8", "kv.page_size": 16}
KINDS = {"llama": TINY_LLAMA, "deepseek_v3": MODELS["deepseek_v3"]}
BACKENDS = {
    ("llama", False): "TorchAttention",
    ("llama", True): "FixedOrderAttention",
    ("deepseek_v3", False): "PlainMlaFp8",
    ("deepseek_v3", True): "FixedOrderMlaFp8",
}
PROMPT = list(range(3, 50))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder = write_tiny_llama(tmp_path_factory.mktemp(kind), base=KINDS[kind])
    return Harness(folder, **FP8, **{"engine.deterministic": True})


def page_bytes(model: Harness) -> int:
    return KVPool.bytes_per_page(model.loaded.model.spec.kv, 16, torch.float8_e4m3fn)


async def test_tokens_do_not_depend_on_what_else_runs(model: Harness) -> None:
    """A prompt computed alone and whole, in chunks among others, behind a prefix, and again after a preemption."""
    rng = random.Random(7)
    shared = rng.choices(range(3, 160), k=40)
    work = [
        ([*shared[: rng.randint(1, 40)], *rng.choices(range(3, 160), k=rng.randint(1, 20))], {"seed": i, "temperature": i % 2})
        for i in range(6)
    ]
    params: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    async with model.engine(**{"kv.prefix_cache": False, "engine.overlap_depth": 0}) as running:
        expected = [await running.tokens(tokens, **params, **own) for tokens, own in work]
    crowded = {"engine.overlap_depth": 1, "scheduler.prefill_tokens": 17, "kv.memory": str(10 * page_bytes(model))}
    async with model.engine(**crowded, **{"model.max_model_len": 128}) as running:
        ids = [running.submit(tokens, **params, **own) for tokens, own in work]
        assert [await running.rest(i) for i in ids] == expected
        assert running.engine.stats().preemptions > 0
        again = running.submit(work[0][0], **params, **work[0][1])
        outputs = await running.outputs(again)
        assert [t for output in outputs for t in output.tokens] == expected[0]
        assert running.engine.stats().cached_tokens > 0


async def test_the_fast_mode_serves_too(model: Harness, kind: str) -> None:
    """Other rounding, the same logic: all requests end, and the first token of most is deterministic mode's."""
    prompts = [PROMPT[:length] for length in (1, 15, 16, 17, 40)]
    found = []
    for deterministic in (False, True):
        async with model.engine(**{"engine.deterministic": deterministic, "scheduler.prefill_tokens": 16}) as running:
            assert type(running.engine.executor.programs.attention).__name__ == BACKENDS[kind, deterministic]  # type: ignore[attr-defined]
            ids = [running.submit(prompt, max_tokens=9, ignore_eos=True) for prompt in prompts]
            found.append(await asyncio.gather(*(running.rest(i) for i in ids)))
    assert all(len(tokens) == 9 for tokens in found[0])
    assert sum(fast[0] == slow[0] for fast, slow in zip(*found, strict=True)) >= 3


async def test_the_pool_is_as_small_as_its_tokens(model: Harness, kind: str) -> None:
    kv = model.loaded.model.spec.kv
    token = kv.latent_dim + 4 + 2 * kv.rope_dim if kind != "llama" else kv.heads * (kv.head_dim + kv.v_head_dim)
    async with model.engine(**{"kv.memory": str(40 * 16 * kv.layers * token)}) as running:
        info = running.engine.info
        assert (info.kv_dtype, info.kv_tokens) == ("float8_e4m3fn", 40 * 16)
        assert info.memory["kv_pool"] == 41 * 16 * kv.layers * token


async def test_drafts_change_no_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The draft layer's KV is of the same format, and verification reads several rows a sequence."""
    folder = mtp.write_checkpoint(tmp_path_factory.mktemp("mtp"), mtp.CONFIGS["longcat"])
    drafts = {"speculative.method": "mtp", "speculative.k": 3}
    model = Harness(folder, **FP8, **drafts, **{"model.load_format": "safetensors", "engine.deterministic": True})
    prompts = [[(11 * i + 5 * p) % 150 + 3 for i in range(length)] for p, length in enumerate((1, 15, 16, 33))]
    params: dict[str, Any] = {"max_tokens": 14, "ignore_eos": True}
    async with model.engine(**{"speculative.method": "none"}) as running:
        expected = [await running.tokens(prompt, **params) for prompt in prompts]
    for deterministic in (True, False):
        async with model.engine(**{"engine.deterministic": deterministic}) as running:
            found = await asyncio.gather(*(running.tokens(prompt, **params) for prompt in prompts))
            stats = running.engine.stats().speculative
            assert stats is not None
            assert sum(stats.drafted)
            assert stats.error is None
            if deterministic:
                assert found == expected


def test_pages_that_planes_do_not_fit_are_refused(kind: str, model: Harness) -> None:
    if kind == "llama":
        assert model.settings(**{"kv.page_size": 8}).kv.dtype == "fp8"
        return
    from fluentllm.assembly import assemble

    with pytest.raises(ConfigError, match="multiples of 16 tokens, not 8"):
        assemble(model.settings(**{"kv.page_size": 8}), "tiny", model.loaded, model.plugins)
