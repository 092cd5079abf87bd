"""The thin end of the lossless matrix: models that predict something, where drafts are accepted in earnest."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from engine.harness import Harness

from fluentllm.core.errors import FluentError
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import DEFAULTS, resolve

from . import mtp
from .watching import Drafted, half_right, unchanged, watched

if TYPE_CHECKING:
    from fluentllm.core.types import RequestOutput

TEXTS = {
    "longcat-nano": ["class Parser:\n    def __init__(self, ", "import os\n\n\ndef ", "for line in lines:\n        if line."],
    "longcat-nano-ngram": ["import os\n\n\ndef ", "class Parser:\n    def __init__(self, "],
    "smollm2": ["The river rose on Monday. The river fell on Tuesday. The river rose on"],
}
METHODS = [("longcat-nano", "mtp"), ("longcat-nano", "pld"), ("longcat-nano-ngram", "mtp"), ("smollm2", "pld")]
METHODS += [("smollm2", method) for method in DEFAULTS["smollm2"].drafts]
NEW = {"smollm2": 10}


class Real:
    """A model, prompts, and the answers without speculation."""

    def __init__(self, name: str, method: str) -> None:
        settings = {"model.load_format": "auto", "engine.deterministic": True, "kv.page_size": 16, "model.max_model_len": 128}
        # A draft model belongs to a default's name.
        self.model = Harness(name, **settings, **{"model.name": name, "speculative.method": method, "speculative.max_k": 5})
        tokenizer = load_tokenizer(resolve(name).path)
        self.work: list[tuple[list[int], dict[str, Any]]] = [
            (
                tokenizer.encode(text),
                {"max_tokens": NEW.get(name, 16), "ignore_eos": True, "temperature": (0.0, 0.7)[i % 2], "seed": i},
            )
            for i, text in enumerate(TEXTS[name])
        ]
        self.answers = asyncio.run(self._off())
        self.reference = mtp.Reference(self.model.loaded.model) if method == "mtp" else None

    async def _off(self) -> list[list[int]]:
        settings = {"speculative.method": "none", "engine.overlap_depth": 0, "kv.prefix_cache": False}
        async with self.model.engine(**settings) as running:
            return [await running.tokens(tokens, **params) for tokens, params in self.work]


@pytest.fixture(scope="module", params=METHODS, ids="-".join)
def real(request: pytest.FixtureRequest) -> tuple[Real, str]:
    name, method = request.param
    try:
        return Real(name, method), method
    except FluentError as error:
        if name != "smollm2":
            raise
        pytest.skip(f"the default model is not to be had: {error}")


async def run(real: Real, method: str, doctor: Any, **settings: Any) -> tuple[list[list[RequestOutput]], list[Drafted]]:
    record: list[Drafted] = []
    settings = {"speculative.method": "watched", "scheduler.prefill_tokens": 16, **settings}
    async with real.model.engine(plugins=watched(method, record, doctor), **settings) as running:
        ids = [running.submit(tokens, **params) for tokens, params in real.work]
        found = [await running.outputs(i) for i in ids]
        again = await running.outputs(running.submit(real.work[0][0], **real.work[0][1]))
        assert [t for o in again for t in o.tokens] == real.answers[0]
        assert (again[0].cached_tokens > 0) == (len(real.work[0][0]) > 16)
        stats = running.engine.stats().speculative
    assert [[t for o in outputs for t in o.tokens] for outputs in found] == real.answers
    assert stats is not None
    assert stats.error is None
    return found, record


@pytest.mark.parametrize(("k", "depth"), [(5, 1)])
async def test_own_drafts(real: tuple[Real, str], k: int, depth: int) -> None:
    model, method = real
    found, record = await run(model, method, unchanged, **{"speculative.k": k, "engine.overlap_depth": depth})
    if model.reference is not None:
        assert sum(o.accepted for outputs in found for o in outputs) > 0, "it was trained to be right at times"
        reference = model.reference
        assert sum(each.check(reference) for each in record) > 0.9 * sum(len(each.drafts) for each in record) > 0


@pytest.mark.parametrize("depth", [0, 2])
async def test_drafts_that_are_partly_right(real: tuple[Real, str], depth: int) -> None:
    model, method = real
    texts = [[*prompt, *answer] for (prompt, _), answer in zip(model.work, model.answers, strict=True)]
    doctor = half_right(texts) if method != "pld" else lambda history, own: half_right(texts)(history, own or [0] * 4)
    found, _ = await run(model, method, doctor, **{"speculative.k": 4, "engine.overlap_depth": depth})
    assert max(o.accepted for outputs in found for o in outputs) >= 3
