"""Text in, text out, on the test double: deltas, choices, logprobs, errors and leaving. On a real engine: `tests/api`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from fluentllm.core.errors import ContextTooLong, EngineDied, EngineUnavailable, InvalidRequest
from fluentllm.frontend.generation import Generation, Usage
from fluentllm.frontend.sampling import SamplingOptions, check_options, choice_seed, sampling_params
from fluentllm.frontend.templates import ChatTemplate
from fluentllm.frontend.tokenizer import Tokenizer

from .checkpoints import CHATML
from .echo_engine import EchoEngine, model_info

REPLY = "Zwölf Boxkämpfer 🙂 jagen Viktor."


@pytest.fixture
def generation(bytelevel: Tokenizer) -> Any:
    engine = EchoEngine(model_info(bytelevel.vocab_size, eos=(2,)), bytelevel.encode(REPLY), eos=2)
    made = Generation(engine, bytelevel, ChatTemplate(CHATML))
    yield made
    made.close()


def engine_of(generation: Generation) -> EchoEngine:
    assert isinstance(generation.client, EchoEngine)
    return generation.client


@pytest.mark.parametrize("steps", [[1], [3], [2, 5, 1], [100]])
async def test_deltas_add_up(generation: Generation, steps: list[int]) -> None:
    engine_of(generation).steps = steps
    job = generation.job([[5, 6]], SamplingOptions(), logprobs=0)
    deltas = [delta async for delta in generation.stream(job)]
    assert "".join(delta.text for delta in deltas) == REPLY
    assert [token for delta in deltas for token in delta.tokens] == engine_of(generation).reply
    infos = [info for delta in deltas for info in delta.logprobs or []]
    assert [info.token for info in infos] == engine_of(generation).reply
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert deltas[-1].stop == 2
    assert sum(delta.new_tokens for delta in deltas) == len(engine_of(generation).reply) + 1


@pytest.mark.parametrize("steps", [[1], [4], [100]])
@pytest.mark.parametrize("stop", ["kämpf", "🙂", " 🙂 j", "."])
async def test_stop_strings(generation: Generation, bytelevel: Tokenizer, steps: list[int], stop: str) -> None:
    engine_of(generation).steps = steps
    [done] = await generation.complete(generation.job([[5]], SamplingOptions(stop=[stop, "absent"]), logprobs=0))
    assert done.text == REPLY[: REPLY.index(stop)]
    assert (done.finish_reason, done.stop) == ("stop", stop)
    assert stop in bytelevel.decode(done.tokens)
    assert stop not in bytelevel.decode(done.tokens[:-1])
    assert done.new_tokens == len(done.tokens)
    assert done.logprobs is not None
    assert all(info.offset < len(done.text) for info in done.logprobs)
    assert not engine_of(generation).running


async def test_no_stop_counts_before_min_tokens(generation: Generation) -> None:
    engine_of(generation).reply = [68] * 10  # "c"
    letter = generation.tokenizer.token_text(68)
    job = generation.job([[5]], SamplingOptions(stop=letter, min_tokens=4))
    [done] = await generation.complete(job)
    assert done.text == letter * 3
    assert done.new_tokens == 4


async def test_a_held_back_beginning_is_given_at_the_end(generation: Generation) -> None:
    [done] = await generation.complete(generation.job([[5]], SamplingOptions(stop="Viktor.!")))
    assert done.text == REPLY


async def test_choices_have_seeds_of_their_own(generation: Generation) -> None:
    job = generation.job([[5], [6, 7]], SamplingOptions(n=3, seed=11))
    usage = Usage(prompt_tokens=3)
    engine_of(generation).cached_tokens = 1
    done = await generation.complete(job)
    for one in done:
        usage.add(one, job.n)
    requests = {request.id: request for request in engine_of(generation).requests}
    assert len(requests) == 6
    seeds = [requests[f"{job.id}-{i}"].params.seed for i in range(6)]
    assert seeds[:3] == seeds[3:] == [choice_seed(11, i) for i in range(3)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert [requests[f"{job.id}-{i}"].prompt for i in range(6)] == [[5]] * 3 + [[6, 7]] * 3
    assert usage == Usage(3, 6 * (len(engine_of(generation).reply) + 1), 2)


async def test_without_a_seed_two_requests_differ(generation: Generation) -> None:
    first, second = (generation.job([[5]], SamplingOptions()) for _ in range(2))
    assert first.params[0].seed != second.params[0].seed
    assert 0 <= first.params[0].seed < 2**63
    assert first.id != second.id


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_aborts(generation: Generation, n: int) -> None:
    tasks = asyncio.all_tasks()
    async with aclosing(generation.stream(generation.job([[5]], SamplingOptions(n=n)))) as deltas:
        async for _ in deltas:
            break
    assert len(engine_of(generation).aborted) == n
    assert not engine_of(generation).running
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize("n", [1, 3])
async def test_a_cancelled_caller_aborts(generation: Generation, n: int) -> None:
    engine_of(generation).pause = 0.01
    task = asyncio.create_task(generation.complete(generation.job([[5]], SamplingOptions(n=n))))
    await asyncio.sleep(0.03)
    assert len(engine_of(generation).running) == n
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not engine_of(generation).running
    assert len(engine_of(generation).aborted) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_an_engine_error_reaches_the_caller(generation: Generation, n: int) -> None:
    engine = engine_of(generation)
    engine.failure, engine.fail_after = EngineDied("gone"), 3
    with pytest.raises(EngineDied):
        await generation.complete(generation.job([[5]], SamplingOptions(n=n)))
    assert not engine.running


async def test_an_engine_that_was_never_ready(bytelevel: Tokenizer) -> None:
    generation = Generation(EchoEngine(None), bytelevel, None)
    with pytest.raises(EngineUnavailable, match="starting"):
        await generation.encode("x")
    with pytest.raises(EngineUnavailable):
        generation.job([[1]], SamplingOptions())
    generation.close()


async def test_chats_have_their_special_tokens_once(generation: Generation) -> None:
    ids = await generation.encode_chat([{"role": "user", "content": "Hi"}])
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert await generation.decode(ids) == text
    assert ids.count(1) == 2
    open_ended = await generation.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert ids[: len(open_ended)] == open_ended


async def test_bos_is_not_doubled(pieces: Tokenizer) -> None:
    generation = Generation(
        EchoEngine(model_info(pieces.vocab_size)), pieces, ChatTemplate("{{ bos_token }}Hi", pieces.special.names)
    )
    assert (await generation.encode_chat([])).count(1) == 1
    assert (await generation.encode("Hi")).count(1) == 1
    text, offsets = generation.prompt_text(await generation.encode("Hi the"))
    assert text == "Hi the"
    assert offsets[:2] == [0, 0]
    generation.close()


async def test_no_chat_template(bytelevel: Tokenizer) -> None:
    generation = Generation(EchoEngine(model_info(400)), bytelevel, None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        await generation.encode_chat([{"role": "user", "content": "Hi"}])
    generation.close()


# --------------------------------------------------------------------------------------------------------------- sampling
def params(tokenizer: Tokenizer, prompt: int = 10, **options: Any) -> Any:
    return sampling_params(SamplingOptions(**options), prompt, model_info(400, 256, eos=(2,)), tokenizer)


def test_the_context_bounds_what_is_asked(bytelevel: Tokenizer) -> None:
    assert params(bytelevel).max_tokens == 246
    assert params(bytelevel, max_tokens=246).max_tokens == 246
    with pytest.raises(ContextTooLong, match="10 tokens and max_tokens asks for 247 more, 257 in all"):
        params(bytelevel, max_tokens=247)
    with pytest.raises(ContextTooLong, match="256 tokens"):
        params(bytelevel, 256)
    with pytest.raises(InvalidRequest, match="no tokens"):
        params(bytelevel, 0)
    small = msgspec.structs.replace(model_info(400, 256), kv_tokens=64)
    assert sampling_params(SamplingOptions(), 10, small, bytelevel).max_tokens == 54
    with pytest.raises(ContextTooLong, match=r"KV pool holds 64 tokens .*kv\.memory"):
        sampling_params(SamplingOptions(max_tokens=55), 10, small, bytelevel)


def test_the_tokenizers_ends_are_added(bytelevel: Tokenizer) -> None:
    info = model_info(400, eos=(0,))
    ids = sampling_params(SamplingOptions(stop_token_ids=[9]), 1, info, bytelevel).stop_token_ids
    assert ids == (9, 2)
    ids = sampling_params(SamplingOptions(stop_token_ids=[9], ignore_eos=True), 1, info, bytelevel).stop_token_ids
    assert ids == (9,)


def test_spellings_of_off(bytelevel: Tokenizer) -> None:
    assert params(bytelevel, top_k=-1).top_k == params(bytelevel, top_k=0).top_k == 0
    assert params(bytelevel, top_p=0).top_p > 0
    assert params(bytelevel, seed=-1).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 3.0}, "temperature"),
        ({"temperature": float("nan")}, "nan"),
        ({"logit_bias": {"5": float("nan")}}, "nan"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"n": 0}, "n"),
        ({"max_tokens": "5"}, "max_tokens"),
    ],
)
def test_options_made_in_python_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check_options(SamplingOptions(**options))
    assert check_options(SamplingOptions(temperature=1)).temperature == 1
