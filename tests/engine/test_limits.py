"""At the limits: contexts that are full to the last token, queues that are full, the largest steps."""

from __future__ import annotations

import asyncio
import time

import pytest

from fluentllm.core.errors import ContextTooLong, QueueFull
from fluentllm.core.executor import Executor
from fluentllm.rehearsal import Largest, plans

from .harness import Harness


@pytest.mark.parametrize("prompt", [1, 64, 500, 511])
async def test_a_request_may_fill_the_context_to_the_last_token(tiny: Harness, prompt: int) -> None:
    """512 tokens, prompt and answer; one more is refused with the numbers."""
    async with tiny.engine() as running:
        outputs = await running.outputs(running.submit([5] * prompt, max_tokens=512 - prompt, ignore_eos=True))
        assert sum(len(output.tokens) for output in outputs) == 512 - prompt
        assert outputs[-1].finish_reason == "length"
        with pytest.raises(
            ContextTooLong, match=rf"{prompt} prompt tokens and {513 - prompt} new ones exceed the context of 512"
        ):
            running.submit([5] * prompt, max_tokens=513 - prompt)
        with pytest.raises(ContextTooLong, match="512 prompt tokens"):
            running.submit([5] * 512, max_tokens=1)


async def test_ten_thousand_requests_at_once(tiny: Harness) -> None:
    """The queue is bounded: what does not fit is refused at once, what fits is answered, nothing hangs."""
    async with tiny.engine(**{"scheduler.max_waiting": 2000, "scheduler.max_running": 256}) as running:
        accepted, refused = [], 0
        started = time.monotonic()
        for number in range(10_000):
            try:
                accepted.append(running.submit([number % 150 + 3, 7], max_tokens=1, ignore_eos=True))
            except QueueFull:
                refused += 1
        with pytest.raises(QueueFull, match=r"scheduler\.max_waiting"):
            running.submit([5])
        assert time.monotonic() - started < 10
        assert (len(accepted), refused) == (2000, 8000)
        answers = await asyncio.gather(*(running.rest(request) for request in accepted))
        assert all(len(tokens) == 1 for tokens in answers)
        running.submit([5, 7], max_tokens=1)  # there is room again


@pytest.mark.parametrize(
    "largest",
    [
        Largest(64, 3, 512),
        Largest(700, 3, 512),  # a chunk of several prompts
        Largest(2000, 2, 512),  # more than the slots can hold
        Largest(64, 3, 512, whole_context=True),
    ],
)
async def test_the_largest_steps_run_on_scratch_pages(tiny: Harness, largest: Largest) -> None:
    async with tiny.engine(**{"scheduler.max_running": 3}) as running:
        programs, tables = running.engine.executor.programs, running.engine.executor.tables
        executor = Executor(programs, tables, threads=1)
        planned = plans(largest)
        results = [executor.launch(plan).result() for plan in planned]
        executor.close()
        prefilled = [sum(chunk.count for chunk in plan.prefill) for plan in planned]
        assert prefilled == [min(largest.prefill_tokens, largest.sequences * 511)] * 4 + [0] * 4
        assert all(len(slot.tokens) == 1 for slot in results[0].slots)
        assert results[0].slots[0].prompt_logprobs is not None
        for plan, result in zip(planned[:4], results, strict=False):
            assert [slot.slot for slot in result.slots] == [chunk.slot for chunk in plan.prefill]
        for result in results[4:]:
            assert [slot.slot for slot in result.slots] == list(range(largest.sequences))
            assert all(len(slot.tokens) == 1 and slot.finished is None for slot in result.slots)
