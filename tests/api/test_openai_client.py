"""The public `openai` client against a real engine: what its users do, streaming and not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from .conftest import Api

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def client(real: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=10, logprobs=True, top_logprobs=2, user="me"
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert len(choice.logprobs.content) == answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_streamed(client: openai.AsyncOpenAI) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 10}
    whole = await client.chat.completions.create(**options)
    text, reasons, usage = "", [], None
    async for chunk in await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
        usage = chunk.usage
    assert text == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_chat_by_the_clients_stream_helper(client: openai.AsyncOpenAI) -> None:
    backtick, end = 66, 2  # min_tokens keeps the end away from the first two
    options = {"model": "tiny", "messages": MESSAGES, "logit_bias": {backtick: 90, end: 100}, "extra_body": {"min_tokens": 2}}
    async with client.chat.completions.stream(**options) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == "``"
    assert final.choices[0].finish_reason == "stop"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    options = {"model": "tiny", "prompt": ["Once", "Twice"], "temperature": 0, "max_tokens": 5, "logprobs": 2, "echo": True}
    whole = await client.completions.create(**options)
    texts = ["", ""]
    async for chunk in await client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith("Once")
    assert texts[1].startswith("Twice")


async def test_extensions_go_in_the_extra_body(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=6, temperature=1, extra_body={"top_k": 1, "ignore_eos": True, "min_p": 0.1}
    )
    greedy = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == greedy.choices[0].text


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_errors_become_the_clients_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        await client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, prediction={"type": "content", "content": "x"})
    assert refused.value.param == "prediction"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="tiny", prompt="x", max_tokens=5000)
    assert refused.value.code == "context_length_exceeded"


async def test_leaving_a_stream(client: openai.AsyncOpenAI) -> None:
    """The `real` fixture then checks that the engine is idle and no page is held."""
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
