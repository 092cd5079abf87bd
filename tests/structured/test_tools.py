"""Calls of tools that a grammar guarantees, of models that know nothing of them: whole, streamed, several, with speculation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest
from api.conftest import Api, serving_real
from api.tools import PLAIN, write_model

from fluentllm.hub import resolve

from .conftest import needs_xgrammar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHAT = "/v1/chat/completions"
HI: list[dict[str, Any]] = [{"role": "user", "content": "The weather in Paris, for three days?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "name": {"type": "string", "maxLength": 6},
    },
    "required": ["city", "days", "name"],
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}
LIMITS: dict[str, Any] = {"max_tokens": 120, "seed": 4, "temperature": 0.8}
SETTINGS = {"plugins.grammar_xgrammar.max_whitespace": 1}


@pytest.fixture(params=["hermes", "mistral"])
async def nano(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Api]:
    """With speculation, in two of the formats."""
    (tmp_path / "chat.jinja").write_text(PLAIN)
    settings = {
        **SETTINGS,
        "model.load_format": "auto",
        "model.served_name": "nano",
        "model.chat_template": str(tmp_path / "chat.jinja"),
        "model.answer_format": request.param,
        "speculative.method": "mtp",
    }
    async with serving_real(resolve("longcat-nano").path, **settings) as api:
        yield api


@pytest.fixture
async def special(tmp_path: Path) -> AsyncIterator[Api]:
    """Random weights, and LongCat's markers as special tokens."""
    async with serving_real(write_model(tmp_path, "longcat"), **SETTINGS) as api:
        yield api


def check(choice: Any, *, required: bool = True) -> list[str]:
    """Names of the calls, whose arguments must fit."""
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert choice["message"]["content"] is None or not required
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), PARAMETERS if call["name"] == "get_weather" else {"type": "object"})
    return [call["name"] for call in calls]


async def streamed(api: Api, **fields: Any) -> list[tuple[list[list[str]], str]]:
    """For each choice its calls, name and arguments, and why it ended."""
    calls: dict[int, list[list[str]]] = {}
    reasons = {}
    for event in await api.events(CHAT, **fields):
        [chunk] = event["choices"]
        here = calls.setdefault(chunk["index"], [])
        for call in chunk["delta"].get("tool_calls", []):
            if "id" in call:
                here.append([call["function"]["name"], ""])
            here[call["index"]][1] += call["function"]["arguments"]
        if chunk["finish_reason"] is not None:
            reasons[chunk["index"]] = chunk["finish_reason"]
    return [(calls[index], reasons[index]) for index in sorted(calls)]


@needs_xgrammar
async def test_a_named_function_is_called_once(nano: Api) -> None:
    fields = {"messages": HI, "tools": TOOLS, "tool_choice": NAMED, "n": 3, **LIMITS}
    choices = (await nano.post(CHAT, **fields))["choices"]
    assert len(choices) == 3
    for choice in choices:
        assert choice["finish_reason"] == "tool_calls"
        assert check(choice) == ["get_weather"]
    for (calls, reason), choice in zip(await streamed(nano, **fields), choices, strict=True):
        assert reason == "tool_calls"
        assert calls == [[call["function"]["name"], call["function"]["arguments"]] for call in choice["message"]["tool_calls"]]


@needs_xgrammar
async def test_a_call_is_required(nano: Api) -> None:
    seen: set[str] = set()
    for seed in range(4):
        fields = {"messages": HI, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
        [choice] = (await nano.post(CHAT, **fields, **{**LIMITS, "seed": seed}))["choices"]
        assert check(choice) == ["get_weather"]
        seen.add(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert len(seen) > 1


@needs_xgrammar
@pytest.mark.parametrize("most", range(1, 9))
async def test_of_a_required_call_that_is_cut_early_nothing_is_content(nano: Api, most: int) -> None:
    """Its marker, or the beginning of its name."""
    fields = {"messages": HI, "tools": [WEATHER], "tool_choice": "required", **LIMITS, "max_tokens": most}
    [choice] = (await nano.post(CHAT, **fields))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")
    assert "content" not in {key for event in await nano.events(CHAT, **fields)
                             for key, value in event["choices"][0]["delta"].items() if value}  # fmt: skip


@needs_xgrammar
@pytest.mark.parametrize("strict", [False, True])
async def test_an_answer_is_calls_or_what_the_response_format_says(nano: Api, strict: bool) -> None:
    """As OpenAI has it, strict functions too: the answer is a call as its schema says, or it is what the format says."""
    weather = {"type": "function", "function": {**WEATHER["function"], "strict": strict}}
    pair: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "pair", "schema": pair}}
    assert nano.services.answers is not None
    [marker] = [text for text in ("<tool_call>", "[TOOL_CALLS]") if text in nano.services.answers.markers]
    first = nano.services.tokenizer.encode(marker)[0]
    fields = {"messages": HI, "tools": [weather], "response_format": wanted, "parallel_tool_calls": False, **LIMITS}
    [choice] = (await nano.post(CHAT, **fields, logit_bias={str(first): 100}))["choices"]
    assert check(choice) == ["get_weather"]
    [choice] = (await nano.post(CHAT, **fields, logit_bias={str(first): -100}))["choices"]
    jsonschema.validate(json.loads(choice["message"]["content"]), pair)
    for stream in (False, True):
        bad = {**fields, "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "stream": stream}
        error = await nano.error(CHAT, status=400, **bad)
        assert error["param"] == f"{'tools[0].function.strict, ' if strict else ''}response_format.json_schema.schema"
        error = await nano.error(CHAT, status=400, **{**fields, "tool_choice": "required", "stream": stream})
        assert error["param"] == "tool_choice"


@needs_xgrammar
async def test_the_openai_client(nano: Api) -> None:
    async with openai.AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0) as client:
        given: dict[str, Any] = {"model": "nano", "messages": HI, "tools": [WEATHER], "tool_choice": NAMED, **LIMITS}
        answer = await client.chat.completions.create(**given)
        [call] = answer.choices[0].message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        async with client.chat.completions.stream(**given) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        [again] = final.choices[0].message.tool_calls or []
        assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)


@needs_xgrammar
async def test_the_documented_request() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "api.md").read_text(encoding="utf-8").split("\n## Tools\n")[1]
    [body] = re.findall(r"-d '(.*?)'\n```", page.split("\n## ")[0], re.DOTALL)
    [template] = re.findall(r"model\.chat_template=(\S+)", page.split("\n## ")[0])
    overrides = {"model.load_format": "auto", "model.chat_template": str(root / template)}
    async with serving_real(resolve("longcat-nano").path, **SETTINGS, **overrides) as api:
        asked = json.loads(body)
        [choice] = (await api.post(CHAT, **asked))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert set(json.loads(call["function"]["arguments"])) == {"city"}
        told = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny."}
        messages = [*asked["messages"], choice["message"], told]
        await api.post(CHAT, messages=messages, tools=asked["tools"], max_tokens=3, ignore_eos=True)


@needs_xgrammar
async def test_markers_that_are_special_tokens(special: Api) -> None:
    tokenizer = special.services.tokenizer
    begin, end = (tokenizer.backend.token_to_id(text) for text in ("<longcat_tool_call>", "</longcat_think>"))
    bias = {str(begin): 100}
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    once = {"messages": HI, "tools": [strict], "parallel_tool_calls": False, **LIMITS}
    # May call, and begins to at once.
    [choice] = (await special.post(CHAT, **once, logit_bias=bias, logprobs=True))["choices"]
    assert check(choice) == ["get_weather"]
    assert choice["logprobs"]["content"][0]["token"] == "<longcat_tool_call>"
    [(calls, reason)] = await streamed(special, **once, logit_bias=bias)
    assert (calls[0][0], reason) == ("get_weather", "tool_calls")
    # Must call, and thinks first: the prompt has begun it.
    thinks = {"chat_template_kwargs": {"thinking": True}, "tool_choice": "required", "stop": "nowhere"}
    [choice] = (await special.post(CHAT, **once, **thinks, logit_bias={str(end): 100}))["choices"]
    assert check(choice) == ["get_weather"]
    assert "reasoning_content" not in choice["message"]


@needs_xgrammar
async def test_what_cannot_be_guaranteed_is_told_by_its_field(nano: Api) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}, "required": ["a"]}
    strict = [TIME, {"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}]
    loose = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    asked: list[tuple[dict[str, Any], str, str]] = [
        ({"tools": strict}, "tools[1].function.strict", "multipleOf"),
        ({"tools": strict, "tool_choice": "required"}, "tool_choice", "multipleOf"),
        ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 3}, "min_tokens", "Leave min_tokens out"),
    ]
    for fields, param, words in asked:
        for stream in (False, True):
            error = await nano.error(CHAT, status=400, messages=HI, stream=stream, **fields, **LIMITS)
            assert error["param"] == param, error
            assert words in error["message"]
    answer = await nano.post(CHAT, messages=HI, tools=loose, tool_choice="required", parallel_tool_calls=False, **LIMITS)
    assert check(answer["choices"][0]) == ["f"]


async def test_without_the_library_it_is_refused(nano: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for after the fixture has looked, so by an engine of its own."""
    monkeypatch.setattr("fluentllm.plugins.grammar_xgrammar._version", lambda: None)
    settings = nano.services.settings.model
    overrides = {
        "model.load_format": "auto",
        "model.chat_template": settings.chat_template,
        "model.answer_format": settings.answer_format,
    }
    async with serving_real(resolve("longcat-nano").path, **overrides) as api:
        strict = [{"type": "function", "function": {**TIME["function"], "strict": True}}]
        asked: list[tuple[dict[str, Any], str]] = [
            ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
            ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice"),
            ({"tools": strict}, "tools[0].function.strict"),
        ]
        for fields, param in asked:
            for stream in (False, True):
                error = await api.error(CHAT, status=400, messages=HI, stream=stream, **fields, **LIMITS)
                assert error["param"] == param
                assert "pip install 'fluentllm[grammar]'" in error["message"]
        await api.post(CHAT, messages=HI, tools=TOOLS, max_tokens=3, ignore_eos=True)
