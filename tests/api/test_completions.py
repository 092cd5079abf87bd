"""`POST /v1/completions`: prompts as text and ids, several at once, echo, logprobs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fluentllm.plugins.api_openai.answers import TextCompletion

from .conftest import Api

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


async def test_sixteen_tokens_unless_told_otherwise(real: Api) -> None:
    answer = msgspec.convert(await real.complete("Once upon", **GREEDY), TextCompletion, strict=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_text_and_its_ids_are_the_same_prompt(real: Api) -> None:
    ids = real.services.tokenizer.encode("Once upon")
    text, tokens = await real.complete("Once upon", **GREEDY), await real.complete(ids, **GREEDY)
    assert text["choices"] == tokens["choices"]
    assert text["usage"]["prompt_tokens"] == len(ids)


async def test_several_prompts_with_several_choices(real: Api) -> None:
    prompts = ["Once upon", "The lazy dog"]
    fields = {"n": 2, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    together = await real.complete(prompts, **fields)
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    for number, prompt in enumerate(prompts):
        alone = await real.complete(prompt, **fields)
        texts = [choice["text"] for choice in together["choices"][2 * number : 2 * number + 2]]
        assert texts == [choice["text"] for choice in alone["choices"]]
    ids = [real.services.tokenizer.encode(prompt) for prompt in prompts]
    assert (await real.complete(ids, **fields))["choices"] == together["choices"]
    assert together["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert together["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_stream_adds_up_to_the_whole(real: Api, logprobs: int | None) -> None:
    fields = {"prompt": ["Once", "Twice"], "echo": True, "logprobs": logprobs, "max_tokens": 8, **GREEDY}
    whole = await real.post("/v1/completions", **fields)
    events = await real.events("/v1/completions", **fields)
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs is not None:
            for name in ("tokens", "text_offset"):
                streamed = [value for part in mine if part["logprobs"] for value in part["logprobs"][name]]
                assert streamed == choice["logprobs"][name]


async def test_echo_begins_with_the_prompt_and_its_logprobs(real: Api) -> None:
    prompt = "The quick brown fox"
    plain = await real.complete(prompt, max_tokens=5, logprobs=2, **GREEDY)
    answer = await real.complete(prompt, max_tokens=5, logprobs=2, echo=True, **GREEDY)
    [choice] = answer["choices"]
    assert choice["text"] == prompt + plain["choices"][0]["text"]
    logprobs = choice["logprobs"]
    length = answer["usage"]["prompt_tokens"]
    assert {len(values) for values in logprobs.values()} == {length + 5}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert "".join(logprobs["tokens"][:length]) == prompt
    before = ""
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        # Bytes that are no character come out together with the token that shows it.
        assert choice["text"][offset:].startswith(token) or token.startswith("bytes:") or before.startswith("bytes:")
        before = token
    assert logprobs["text_offset"][length] == len(prompt)
    assert logprobs["tokens"][length:] == plain["choices"][0]["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][length:] == pytest.approx(plain["choices"][0]["logprobs"]["token_logprobs"], abs=1e-4)


async def test_scoring_a_text_generates_nothing(real: Api) -> None:
    answer = await real.complete("The quick brown fox", max_tokens=0, logprobs=0, echo=True)
    [choice] = answer["choices"]
    assert choice["text"] == "The quick brown fox"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"
    [event] = await real.events("/v1/completions", prompt="The quick brown fox", max_tokens=0, logprobs=0, echo=True)
    assert event["choices"] == [choice]


async def test_prompt_logprobs_are_those_of_generation(real: Api) -> None:
    """What a token scored when it was generated is what it scores as part of a prompt."""
    ids = real.services.tokenizer.encode("The lazy")
    first = await real.complete(ids, max_tokens=6, logprobs=0, **GREEDY)
    names = first["choices"][0]["logprobs"]["tokens"]
    by_name = {name: i for i in range(400) if (name := _name(real, i))}
    engine_tokens = [by_name[name] for name in names]
    again = await real.complete([*ids, *engine_tokens], max_tokens=0, logprobs=0, echo=True)
    for name, top in zip(names, first["choices"][0]["logprobs"]["top_logprobs"], strict=True):
        assert list(top) == [name]  # none of the likeliest was asked for; the token itself is always there
    scored = again["choices"][0]["logprobs"]["token_logprobs"][len(ids) :]
    assert scored == pytest.approx(first["choices"][0]["logprobs"]["token_logprobs"], abs=1e-4)


def _name(api: Api, token: int) -> str:
    spelt = api.services.tokenizer.token_bytes(token)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


async def test_offsets_of_characters_spread_over_tokens(echo: Api) -> None:
    echo.engine.reply = echo.services.tokenizer.encode("né 🙂!")
    answer = await echo.complete("x", max_tokens=20, logprobs=1)
    [choice] = answer["choices"]
    assert choice["text"] == "né 🙂!"
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    for name, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        if name.startswith("bytes:"):
            assert choice["text"][offset] in "é🙂"
        else:
            assert choice["text"][offset:].startswith(name)


async def test_a_stop_string_across_token_borders(echo: Api) -> None:
    for sizes in ([1], [2, 1], [3], [50]):
        echo.engine.steps = sizes
        events = await echo.events("/v1/completions", prompt="x", max_tokens=40, stop=["tal of F", "zzz"], logprobs=0)
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == "Paris is the capi"
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        names = [name for event in events for name in (event["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
        assert text.startswith("".join(names[:-1]))
        assert "".join(names).startswith(text)
        if sizes == [1]:  # the engine had more to give
            assert len(echo.engine.completed) == 1
        assert not echo.engine.aborted
        assert not echo.engine.running


async def test_best_of_equal_to_n_asks_for_nothing(echo: Api) -> None:
    assert len((await echo.complete(n=2, best_of=2))["choices"]) == 2
    error = await echo.error("/v1/completions", status=400, prompt="x", n=2, best_of=3)
    assert error["param"] == "best_of"
