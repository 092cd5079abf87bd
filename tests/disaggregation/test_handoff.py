"""A prompt computed on one engine and continued on another gives the tokens of one engine."""

from __future__ import annotations

from engine.harness import Harness

from .pair import pair

PROMPT = [(7 * i) % 150 + 3 for i in range(45)]


async def test_one_request(tiny: Harness) -> None:
    async with tiny.engine(**{"disaggregation.role": "both"}) as alone:
        expected = await alone.tokens(PROMPT, max_tokens=12)
    async with pair(tiny) as both:
        outputs = await both.outputs(PROMPT, max_tokens=12)
        assert [token for output in outputs for token in output.tokens] == expected
        report = outputs[0].handoff
        assert report is not None
        assert report.received_bytes == both.layout.bytes_of(len(PROMPT))
        assert both.decode.stats["handoffs_received"] == 1
