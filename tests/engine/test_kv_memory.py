"""An engine that cannot start for want of KV memory says what to set, and starts with that: every advice is taken here, and a
request as long as the context allows is served with it."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from speculation import eagle, mtp

from fluentllm import memory
from fluentllm.assembly import assemble
from fluentllm.core.errors import OutOfMemory
from fluentllm.core.kv import pool

from .harness import Harness, write_tiny_llama
from .test_every_model import MODELS, TINY_LLAMA

if TYPE_CHECKING:
    from pathlib import Path

FP8 = {"kv.dtype": "fp8"}
PLD = {"speculative.method": "pld", "speculative.k": 3}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "gqa fp8 pld": {**FP8, **PLD},
    "mla fp8": FP8,
    "mla pld": PLD,
    "mla mtp": {"speculative.max_k": 3},
    "mla fp8 mtp": {**FP8, "speculative.k": 4},
    "gqa eagle": {"speculative.max_k": 2},
    "mla eagle": {"speculative.k": 4},
}
"""MTP keeps a layer of the target's kind and a state a page, EAGLE beside MLA a pool of another kind."""
CONTEXT = 90


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    kind, *more = request.param.split()
    settings = {"engine.deterministic": False, "kv.page_size": 16, "scheduler.max_running": 3, "model.max_model_len": CONTEXT}
    settings |= CASES[request.param]
    if "mtp" in more:
        made = mtp.harness(tmp_path, "deepseek_v3")
    elif "eagle" in more:
        made = eagle.harness(tmp_path, "eagle3", "llama" if kind == "gqa" else "mla")
    else:
        base = TINY_LLAMA if kind == "gqa" else MODELS["deepseek_v3"]
        made = Harness(write_tiny_llama(tmp_path, base=base))
    made.overrides |= settings
    return made


def start(model: Harness, settings: dict[str, Any]) -> int:
    """Pages of the pool, after requests to the end of the context: one alone, then more than have room at once."""

    async def serve() -> int:
        async with model.engine(**settings) as running:
            context = running.engine.info.max_model_len
            prompt = [3 + i % 150 for i in range(max(1, context - 12))]
            rest = {"max_tokens": context - len(prompt), "ignore_eos": True}
            assert len(await running.tokens(prompt, **rest)) == rest["max_tokens"]
            ids = [running.submit([9 + i, *prompt[1:]], **rest) for i in range(3)]
            assert [len(await running.rest(i)) for i in ids] == [rest["max_tokens"]] * 3
            return running.engine.kv.pages_total

    return asyncio.run(serve())


def refused(model: Harness, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each of the error's alternatives."""
    with pytest.raises(OutOfMemory) as raised:
        assemble(model.settings(**settings), "tiny", model.loaded, model.plugins)
    *alternatives, last = (raised.value.fix or "").removeprefix("Set ").split(", or ")
    assert last == "free memory."
    assert alternatives
    return [{**settings, **dict(re.findall(r"([a-z_.]+) to (\w+)", one))} for one in alternatives]


def page_bytes(model: Harness) -> int:
    """Of all that the engine keeps of a page."""
    engine = assemble(model.settings(), "tiny", model.loaded, model.plugins)
    engine.executor.close()
    return engine.info.memory["kv_pool"] // (engine.kv.pages_total + 1)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (memory, pool):
        monkeypatch.setattr(module, "free_memory", lambda device: size)


def test_a_pool_of_less_than_one_context(model: Harness) -> None:
    """`kv.memory` or the context: both ways start."""
    page = page_bytes(model)
    more, shorter = refused(model, {"kv.memory": str(4 * page)})
    assert more["kv.memory"] == "1MiB"
    assert start(model, more) >= 6
    assert int(shorter["model.max_model_len"]) < CONTEXT
    assert start(model, shorter) == 4
    longer = {**shorter, "model.max_model_len": int(shorter["model.max_model_len"]) + 1}
    assert refused(model, longer)


def test_a_device_with_less_than_one_context(model: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for or not: the context gets shorter, and the pool smaller."""
    page = page_bytes(model)
    free(monkeypatch, 5 * page)
    for asked in ({}, {"kv.memory": "1GiB"}, {"kv.memory": str(2 * page)}, {"kv.memory": str(5 * page)}):
        for settings in refused(model, asked):
            assert int(settings["model.max_model_len"]) < CONTEXT
            assert 0 < start(model, settings) <= 4


def test_a_pool_of_more_than_the_device_has(model: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_bytes(model)
    for pages in (9, 15):
        free(monkeypatch, pages * page)
        [smaller] = refused(model, {"kv.memory": str(pages * page)})
        assert start(model, smaller) == int(0.9 * pages) - 1


def test_a_plan_of_less_than_one_context_where_more_is_free(model: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not asked for is a share of what is free: one may ask for more."""
    page = page_bytes(model)
    free(monkeypatch, 14 * page)
    asked, shorter = refused(model, {})
    assert start(model, asked) >= 6
    assert start(model, shorter) == int(0.4 * 14) - 1
