"""The default model, real weights: handed over, chunked, seeded and greedy. Both ways run the same shapes, so the tokens are
equal without deterministic mode, in a fifth of its time."""

from __future__ import annotations

import pytest
from engine.harness import Harness

from .pair import pair
from .test_handoff import ALONE, assert_nothing_went_wrong

SETTINGS = {
    "model.load_format": "auto",
    "model.max_model_len": 512,
    "kv.memory": "128MiB",
    "scheduler.prefill_tokens": 32,
    "disaggregation.role": "prefill",
    "disaggregation.transport": "loopback",
}


@pytest.fixture(scope="module")
def smollm2() -> Harness:
    return Harness("smollm2", **SETTINGS)  # type: ignore[arg-type]


async def test_the_tokens_of_one_engine(smollm2: Harness) -> None:
    jobs = [
        ([(37 * i) % 40000 + 100 for i in range(70)], {"max_tokens": 4}),
        ([(91 * i) % 40000 + 100 for i in range(20)], {"max_tokens": 4, "temperature": 0.8, "seed": 3, "top_p": 0.9}),
    ]
    async with smollm2.engine(**ALONE) as engine:
        expected = [await engine.tokens(prompt, **params) for prompt, params in jobs]
    async with pair(smollm2) as both:
        for (prompt, params), tokens in zip(jobs, expected, strict=True):
            outputs = await both.outputs(prompt, **params)
            assert [token for output in outputs for token in output.tokens] == tokens
            report = outputs[0].handoff
            assert report is not None
            assert report.received_bytes == both.layout.bytes_of(len(prompt))
        assert_nothing_went_wrong(both)
