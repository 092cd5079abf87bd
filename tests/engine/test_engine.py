"""The engine from submit to the last token, on a tiny random model."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from fluentllm.assembly import assemble
from fluentllm.core.errors import ContextTooLong, InvalidRequest, QueueFull
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import RequestEvent
from fluentllm.core.session import Session
from fluentllm.core.types import (
    Abort,
    ControlCall,
    ControlReply,
    FromEngine,
    Generate,
    KVEvent,
    Request,
    SamplingParams,
    StepPlan,
    StepResult,
)

from .harness import Harness, Running

FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "seed": 2**40 + 5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.2, "seed": 3, "logit_bias": {5: 3.0, 7: -100.0}, "min_tokens": 6},
    {"logprobs": 3},
]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 160), k=length)


def mix(count: int) -> list[tuple[list[int], dict[str, Any]]]:
    rng = random.Random(count)
    return [
        (prompt(i, rng.randint(1, 70)), {**FEATURES[i % len(FEATURES)], "max_tokens": rng.randint(1, 24)}) for i in range(count)
    ]


async def alone(harness: Harness, work: list[tuple[list[int], dict[str, Any]]]) -> list[list[int]]:
    """Each request by itself, on an engine without prefix cache or overlap."""
    async with harness.engine(**{"kv.prefix_cache": False, "engine.overlap_depth": 0}) as running:
        return [await running.tokens(tokens, **params) for tokens, params in work]


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_a_mix_gives_the_tokens_of_each_request_alone(exact: Harness, depth: int) -> None:
    work = mix(18)
    expected = await alone(exact, work)
    settings = {"engine.overlap_depth": depth, "scheduler.max_running": 5, "scheduler.prefill_tokens": 48}
    async with exact.engine(**settings) as running:
        ids = []
        for tokens, params in work:
            ids.append(running.submit(tokens, **params))
            await asyncio.sleep(0.003)
        assert [await running.rest(i) for i in ids] == expected


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_preempted_requests_come_back_to_the_same_tokens(exact: Harness, depth: int) -> None:
    work = [(prompt(i, 40), {**FEATURES[i % len(FEATURES)], "max_tokens": 60, "ignore_eos": True}) for i in range(6)]
    expected = await alone(exact, work)
    page_bytes = 2 * 2 * 16 * 2 * 16 * 4
    settings = {"engine.overlap_depth": depth, "kv.memory": str(34 * page_bytes)}
    async with exact.engine(**settings) as running:
        ids = [running.submit(tokens, **params) for tokens, params in work]
        assert [await running.rest(i) for i in ids] == expected
        assert running.engine.stats().preemptions > 0


async def test_a_prefix_hit_changes_no_token(exact: Harness) -> None:
    shared, params = prompt(1, 50), {"max_tokens": 10, "ignore_eos": True}
    [expected] = await alone(exact, [(shared, params)])
    async with exact.engine() as running:
        assert await running.tokens(shared, **params) == expected
        [first, *_] = await running.outputs(running.submit(shared, **params))
        assert first.cached_tokens == 48
        assert await running.tokens(shared, **params) == expected
        # Generated tokens are in the tree too: a second turn of a chat finds them.
        [first, *_] = await running.outputs(running.submit([*shared, *expected, 5, 6, 7, 8, 9, 10], **params))
        assert first.cached_tokens == 48
        longer = await running.tokens(shared, max_tokens=40, ignore_eos=True)
        [first, *_] = await running.outputs(running.submit([*shared, *longer], **params))
        assert first.cached_tokens == 80
        running.engine.clear_cache()
        [first, *_] = await running.outputs(running.submit(shared, **params))
        assert first.cached_tokens == 0


async def test_a_stop_id_is_the_last_token(tiny: Harness) -> None:
    async with tiny.engine() as running:
        free = await running.tokens(prompt(3, 9), max_tokens=12, ignore_eos=True)
        stop = free[5]
        first = free.index(stop)
        outputs = await running.outputs(running.submit(prompt(3, 9), max_tokens=12, ignore_eos=True, stop_token_ids=(stop,)))
        assert [t for o in outputs for t in o.tokens] == free[: first + 1]
        assert (outputs[-1].finish_reason, outputs[-1].stop_token) == ("stop", stop)
        outputs = await running.outputs(running.submit(prompt(3, 9), max_tokens=12, ignore_eos=True))
        assert (outputs[-1].finish_reason, outputs[-1].stop_token) == ("length", None)


async def test_logprobs_of_answer_and_prompt(tiny: Harness) -> None:
    async with tiny.engine(**{"scheduler.prefill_tokens": 16}) as running:
        tokens = prompt(4, 40)
        outputs = await running.outputs(running.submit(tokens, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True))
        prompt_logprobs = outputs[0].prompt_logprobs
        assert prompt_logprobs is not None
        assert prompt_logprobs[0] is None
        assert [lp.token for lp in prompt_logprobs if lp] == tokens[1:]
        for output in outputs:
            assert output.logprobs is not None
            [chosen] = output.logprobs
            assert chosen.token == output.tokens[0] == chosen.top[0][0]
            assert (chosen.rank, len(chosen.top)) == (1, 2)
            assert chosen.logprob == chosen.top[0][1] < 0


async def test_higher_priority_goes_first(tiny: Harness) -> None:
    finished: list[str] = []
    async with tiny.engine(**{"scheduler.max_running": 1}) as running:
        ids = {running.submit(prompt(i, 8), priority=p, max_tokens=4, ignore_eos=True): p for i, p in enumerate([3, 2, 1, 0])}

        async def follow(request_id: str) -> None:
            await running.outputs(request_id)
            finished.append(request_id)

        await asyncio.gather(*map(follow, ids))
        assert [ids[i] for i in finished] == [0, 1, 2, 3]


async def test_aborted_requests_leave_nothing(tiny: Harness) -> None:
    async with tiny.engine(**{"engine.overlap_depth": 2, "scheduler.max_running": 3}) as running:
        ids = [running.submit(prompt(i, 30), max_tokens=200, ignore_eos=True) for i in range(9)]
        await running.first(ids[0])
        running.connection.abort(ids[:4])
        running.connection.abort(["unknown"])
        other = running.engine.connect(lambda message: None)
        other.close()
        assert len(running.connection.sequences) == 5


async def test_the_reason_of_an_early_end_is_what_the_front_end_says(tiny: Harness) -> None:
    witness = Witness()
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"witness": witness})
    engine = assemble(tiny.settings(), "tiny", tiny.loaded, plugins)
    task = asyncio.create_task(engine.run())
    running = Running(engine)
    session = Session(engine, lambda message: None)
    for name, reason in (("read to a stop string", "stop"), ("its reader left", "abort")):
        request = Request(id=name, prompt=[7], params=SamplingParams(max_tokens=200, ignore_eos=True))
        session.received(Generate(request=request))
        session.received(Abort(ids=[name], reason=reason))
    await running.tokens([7], max_tokens=1)
    engine.stop()
    await task
    ends = {event.id: event.details["reason"] for event in witness.requests if event.kind == "finished"}
    assert ends["read to a stop string"] == "stop"
    assert ends["its reader left"] == "abort"


@pytest.mark.parametrize("answer", ["text", None, object()])
async def test_a_plugins_call_that_answers_with_no_bytes_is_an_error_of_its_own(tiny: Harness, answer: Any) -> None:
    async with tiny.engine() as running:
        running.engine.calls = {"acme": lambda engine, data: answer, "good": lambda engine, data: data}  # type: ignore[misc]
        replies: list[FromEngine] = []
        session = Session(running.engine, replies.append)
        session.received(ControlCall(id=1, method="plugin", name="acme"))
        session.received(ControlCall(id=2, method="plugin", name="good", data=b"x"))
        bad, good = (reply for reply in replies if isinstance(reply, ControlReply))
        assert bad.error == f"The call 'acme' raised TypeError: it returned {type(answer).__name__}, not bytes."
        assert (good.error, good.data) == (None, b"x")


async def test_what_cannot_run_is_refused(tiny: Harness) -> None:
    async with tiny.engine(**{"scheduler.max_waiting": 2, "scheduler.max_running": 1}) as running:
        with pytest.raises(ContextTooLong, match="512"):
            running.submit(prompt(0, 510), max_tokens=3)
        with pytest.raises(InvalidRequest, match="empty"):
            running.submit([])
        with pytest.raises(InvalidRequest, match="160"):
            running.submit([160])
        for _ in range(2):
            running.submit([5], max_tokens=100, ignore_eos=True)
        with pytest.raises(QueueFull, match="max_waiting"):
            running.submit([5])


async def test_a_program_that_raises_reaches_whoever_runs_the_engine(tiny: Harness) -> None:
    def fail(*args: object) -> None:
        raise ArithmeticError("the device is on fire")

    engine = assemble(tiny.settings(), "tiny", tiny.loaded, tiny.plugins)
    engine.executor.programs.run = fail  # type: ignore[method-assign]
    Running(engine).submit([5])
    with pytest.raises(ArithmeticError, match="on fire"):
        await asyncio.wait_for(engine.run(), 10)


class Witness:
    """A plugin that writes down what it observes."""

    def __init__(self) -> None:
        self.requests: list[RequestEvent] = []
        self.steps: list[tuple[StepPlan, StepResult]] = []
        self.kv: list[KVEvent] = []

    @hookimpl
    def fluent_request(self, event: RequestEvent) -> None:
        self.requests.append(event)

    @hookimpl
    def fluent_step(self, plan: StepPlan, result: StepResult) -> None:
        self.steps.append((plan, result))

    @hookimpl
    def fluent_kv_events(self, events: list[KVEvent]) -> None:
        self.kv += events


async def test_observers_see_every_request_step_and_page(tiny: Harness) -> None:
    witness = Witness()
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"witness": witness})
    engine = assemble(tiny.settings(), "tiny", tiny.loaded, plugins)
    task = asyncio.create_task(engine.run())
    running = Running(engine)
    request_id = running.submit(prompt(1, 40), max_tokens=5, ignore_eos=True)
    await running.rest(request_id)
    while engine.has_work:
        await asyncio.sleep(0.002)
    engine.clear_cache()
    await running.tokens([7], max_tokens=1)
    engine.stop()
    await task
    assert [e.kind for e in witness.requests if e.id == request_id] == ["queued", "scheduled", "first_token", "finished"]
    assert witness.requests[3].details == {
        "reason": "length",
        "prompt_tokens": 40,
        "cached_tokens": 0,
        "generated_tokens": 5,
    }
    assert [plan.step for plan, result in witness.steps] == [result.step for plan, result in witness.steps]
    assert sum(len(slot.tokens) for _, result in witness.steps for slot in result.slots) == 6
    assert [event.kind for event in witness.kv] == ["stored", "cleared"]
    assert witness.kv[0].tokens == prompt(1, 40)[:32]


async def test_chunks_of_a_prompt_share_steps_with_others_that_decode(exact: Harness) -> None:
    """Chunked prefill mixed with decode: the long prompt takes several steps, and the running request gets a token in each."""
    async with exact.engine(**{"scheduler.prefill_tokens": 16}) as running:
        plans: list[StepPlan] = []
        launch = running.engine.executor.launch

        def noted(plan: StepPlan) -> Any:
            plans.append(plan)
            return launch(plan)

        running.engine.executor.launch = noted  # type: ignore[method-assign]
        first = running.submit(prompt(1, 8), max_tokens=40, ignore_eos=True)
        await running.first(first)
        second = running.submit(prompt(2, 70), max_tokens=4, ignore_eos=True)
        assert len(await running.rest(second)) == 4
        await running.rest(first)
    mixed = [plan for plan in plans if plan.prefill and plan.decode]
    assert len(mixed) >= 4
    assert [chunk.count for plan in mixed for chunk in plan.prefill][:4] == [16, 16, 16, 16]
