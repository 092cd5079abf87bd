"""`POST /v1/chat/completions` on a real engine: whole answers, streams, and what each field does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fluentllm.plugins.api_openai.answers import ChatChunk, ChatCompletion

from .conftest import Api

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


async def test_answers_in_the_public_schema(real: Api) -> None:
    answer = await real.chat("Where is Paris?", **GREEDY)
    checked = msgspec.convert(answer, ChatCompletion, strict=True)
    assert checked.model == "tiny"
    assert checked.id.startswith("chatcmpl-")
    [choice] = checked.choices
    assert choice.finish_reason == "length"
    assert checked.usage.completion_tokens == 12
    assert checked.usage.total_tokens == checked.usage.prompt_tokens + 12


async def test_streams_the_same_text(real: Api) -> None:
    whole = await real.chat(**GREEDY)
    events = await real.events("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], **GREEDY)
    chunks = [msgspec.convert(event, ChatChunk, strict=True) for event in events]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("usage" not in event for event in events)


async def test_usage_comes_last_when_asked_for(real: Api) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    whole = await real.chat(**GREEDY)
    events = await real.events("/v1/chat/completions", messages=messages, stream_options={"include_usage": True}, **GREEDY)
    assert events[-1]["choices"] == []
    usage = events[-1]["usage"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert all(event["usage"] is None for event in events[:-1])


async def test_a_repeated_prompt_is_cached(real: Api) -> None:
    question = "Why does the quick brown fox jump over the lazy dog, again and again and again?"
    first = await real.chat(question, **GREEDY)
    second = await real.chat(question, **GREEDY)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert second["choices"][0]["message"] == first["choices"][0]["message"]


async def test_a_seed_repeats_and_choices_differ(real: Api) -> None:
    fields = {"seed": 7, "n": 3, "max_tokens": 10, "ignore_eos": True}
    first, second = await real.chat(**fields), await real.chat(**fields)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    alone = await real.chat(seed=7, max_tokens=10, ignore_eos=True)
    assert alone["choices"][0]["message"]["content"] == texts[0]
    assert first["usage"]["completion_tokens"] == 30
    assert first["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]


async def test_choices_stream_side_by_side(real: Api) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "seed": 7, "n": 3, "max_tokens": 10, "ignore_eos": True}
    whole = await real.post("/v1/chat/completions", **fields)
    texts = ["", "", ""]
    for event in await real.events("/v1/chat/completions", **fields):
        [choice] = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


async def test_logprobs_spell_the_text(real: Api) -> None:
    answer = await real.chat(logprobs=True, top_logprobs=3, **GREEDY)
    [choice] = answer["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace") == choice["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= 0
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])  # greedy takes the likeliest
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]


async def test_a_stop_string_ends_the_text_before_it(real: Api) -> None:
    text = (await real.chat(**GREEDY))["choices"][0]["message"]["content"]
    stop = text[4:6]
    cut = await real.chat(stop=[stop, "never there"], **GREEDY)
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 12


async def test_a_stop_token_ends_the_text(real: Api) -> None:
    [free] = (await real.chat(logprobs=True, **GREEDY))["choices"]
    spelt = [bytes(entry["bytes"]) for entry in free["logprobs"]["content"]]
    third = next(i for i in range(400) if real.services.tokenizer.token_bytes(i) == spelt[2])
    cut = await real.chat(stop_token_ids=[third], **GREEDY)
    kept = spelt[: spelt.index(spelt[2])]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["message"]["content"] == b"".join(kept).decode("utf-8", "replace")
    assert cut["usage"]["completion_tokens"] == len(kept) + 1


async def test_a_bias_forces_a_token(real: Api) -> None:
    [token] = real.services.tokenizer.encode("A")
    answer = await real.chat(logit_bias={str(token): 100}, max_tokens=4, ignore_eos=True)
    assert answer["choices"][0]["message"]["content"] == "AAAA"


async def test_the_answer_may_fill_the_context(real: Api) -> None:
    answer = await real.chat("Hi", temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_max_completion_tokens_is_the_newer_name(real: Api) -> None:
    answer = await real.chat(max_completion_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3


async def test_parts_of_text_and_the_developer_role(echo: Api) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    ]
    await echo.post("/v1/chat/completions", messages=messages)
    [request] = echo.engine.requests
    assert echo.services.tokenizer.decode(request.prompt, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_variables_of_the_template(echo: Api) -> None:
    quiet = {"chat_template_kwargs": {"thinking": False}}
    await echo.chat(**quiet)
    [request] = echo.engine.requests
    assert echo.services.tokenizer.decode(request.prompt, skip_special_tokens=False).endswith("assistant\n<quiet>")
    tokenized = await echo.post("/tokenize", messages=[{"role": "user", "content": "Hi"}], **quiet)
    assert tokenized["tokens"] == list(request.prompt)


async def test_an_answer_can_be_sent_back_as_it_came(echo: Api) -> None:
    answer = await echo.chat()
    messages = [{"role": "user", "content": "Hi"}, answer["choices"][0]["message"], {"role": "user", "content": "Sure?"}]
    await echo.post("/v1/chat/completions", messages=messages)


async def test_the_special_end_token_is_no_text(echo: Api) -> None:
    answer = await echo.chat(logprobs=True)
    assert answer["choices"][0]["message"]["content"] == "Paris is the capital of France."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "<|im_end|>" not in [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert answer["usage"]["completion_tokens"] == len(echo.engine.reply) + 1


async def test_parameters_reach_the_engine(echo: Api) -> None:
    fields = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 11,
        "presence_penalty": 0.3, "frequency_penalty": -0.2, "repetition_penalty": 1.1, "ignore_eos": True,
    }  # fmt: skip
    await echo.chat(**fields, logit_bias={"5": -1.5}, stop_token_ids=[7], priority=-3)
    [request] = echo.engine.requests
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert request.params.logit_bias == {5: -1.5}
    assert request.params.stop_token_ids == (7,)
    assert request.priority == -3


async def test_nulls_mean_left_out(echo: Api) -> None:
    await echo.chat(temperature=None, top_p=None, stop=None, n=None, seed=None, tools=[], logit_bias=None, stream=None)
    [request] = echo.engine.requests
    assert request.params.temperature == 1.0
