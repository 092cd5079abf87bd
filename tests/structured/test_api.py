"""Structured outputs over HTTP: OpenAI's field, vLLM's and SGLang's; whole and streamed; what is wrong is told by the field."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest
from api.conftest import Api, serving_real

from fluentllm.core.plugins import PluginManager
from fluentllm.hub import resolve

from .conftest import needs_xgrammar
from .test_engine import PERSON, PROMPT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": PROMPT}]
NANO = {"model.load_format": "auto", "model.served_name": "nano", "plugins.grammar_xgrammar.max_whitespace": 1}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
LIMITS: dict[str, Any] = {"max_tokens": 80, "seed": 4, "temperature": 0.7}


@pytest.fixture
async def nano() -> AsyncIterator[Api]:
    async with serving_real(resolve("longcat-nano").path, **NANO, **{"speculative.method": "mtp"}) as api:
        yield api


@needs_xgrammar
async def test_response_format_whole_and_streamed(nano: Api) -> None:
    whole = (await nano.post(CHAT, messages=HI, response_format=FORMAT, **LIMITS))["choices"][0]
    assert whole["finish_reason"] == "stop"
    jsonschema.validate(json.loads(whole["message"]["content"]), PERSON)
    events = await nano.events(CHAT, messages=HI, response_format=FORMAT, **LIMITS)
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text == whole["message"]["content"]
    assert len(events) > 5
    text = (await nano.post(TEXT, prompt=PROMPT, response_format=FORMAT, **LIMITS))["choices"][0]["text"]
    jsonschema.validate(json.loads(text), PERSON)
    events = await nano.events(TEXT, prompt=PROMPT, response_format=FORMAT, **LIMITS)
    assert "".join(event["choices"][0]["text"] for event in events) == text
    anything = await nano.post(CHAT, messages=HI, response_format={"type": "json_object"}, temperature=0, max_tokens=80)
    assert isinstance(json.loads(anything["choices"][0]["message"]["content"]), dict)
    plain = await nano.post(CHAT, messages=HI, response_format={"type": "text"}, **LIMITS)
    assert plain["choices"] == (await nano.post(CHAT, messages=HI, **LIMITS))["choices"]


TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<",
        "content": {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 10, "maximum": 99}},
        "end": ">",
    },
}


@needs_xgrammar
async def test_every_name_of_every_constraint(nano: Api) -> None:
    number, words = {"type": "integer", "minimum": 10, "maximum": 99}, ["self.a", "None"]
    asked: list[tuple[dict[str, Any], str]] = [
        ({"structured_outputs": {"json": number}}, r"\d\d"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": words}}, r"self\.a|None"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, r"x\d"),
        ({"structured_outputs": {"json_object": True}}, r"(?s)\{.*"),  # which may be long
        ({"guided_json": json.dumps(number)}, r"\d\d"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": words}, r"self\.a|None"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, r"x\d"),
        ({"json_schema": json.dumps(number)}, r"\d\d"),
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"ebnf": 'root ::= "x" [0-9]'}, r"x\d"),
        ({"grammar": {"kind": "regex", "source": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"structural_tag": TAG}}, r"<\d\d>"),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, r"<\d\d>"),
        ({"response_format": TAG}, r"<\d\d>"),
    ]
    for fields, pattern in asked:
        chat = await nano.post(CHAT, messages=HI, **LIMITS, **fields)
        text = await nano.post(TEXT, prompt=PROMPT, n=2, **LIMITS, **fields)
        found = [chat["choices"][0]["message"]["content"], *(choice["text"] for choice in text["choices"])]
        assert all(re.fullmatch(pattern, each) for each in found), (fields, found)


@needs_xgrammar
async def test_the_openai_client_parses(nano: Api) -> None:
    async with openai.AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="nano",
            messages=HI,  # type: ignore[arg-type]
            response_format=FORMAT,  # type: ignore[arg-type]
            extra_body={"min_p": 0.01},
            **LIMITS,
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), PERSON)


@needs_xgrammar
async def test_what_is_wrong_is_told_by_the_field_that_was_sent(nano: Api) -> None:
    bad = {"type": "strin"}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}
    asked: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": named}, "response_format.json_schema.schema", 'Unsupported type "strin"'),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not: it is not supported"),
        ({"guided_json": bad}, "guided_json", "The JSON schema cannot be used"),
        ({"guided_regex": "("}, "guided_regex", "The regular expression cannot be used"),
        ({"ebnf": "root"}, "ebnf", "The grammar cannot be used"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag", "not valid JSON"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.format", "without a format"),
        ({"response_format": {**TAG, "type": "text"}}, "response_format.format", "and a format"),
        (
            {"response_format": {**TAG, "format": {"type": "tagg"}}},
            "response_format.format",
            "The structural tag cannot be used",
        ),
        ({"grammar": {"kind": "regex", "source": "("}}, "grammar", "The regular expression cannot be used"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "Leave min_tokens out"),
    ]
    for fields, param, said in asked:
        for path, prompt in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "x"})):
            for stream in (False, True):
                error = await nano.error(path, status=400, stream=stream, **LIMITS, **prompt, **fields)
                assert (error["code"], error["param"]) == ("invalid_request", param)
                assert said in error["message"]


async def test_without_the_plugin_the_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    load = PluginManager.load
    monkeypatch.setattr(PluginManager, "load", lambda roles, **more: load(roles, **{**more, "deny": ["grammar_xgrammar"]}))
    async with serving_real(resolve("longcat-nano").path, **{"model.load_format": "auto"}) as api:
        error = await api.error(CHAT, status=400, messages=HI, response_format=FORMAT)
        assert error["param"] == "response_format.json_schema.schema"
        assert "No plugin here knows grammars of the kind 'json_schema'" in error["message"]
        assert (await api.post(TEXT, prompt="x", max_tokens=2, ignore_eos=True))["usage"]["completion_tokens"] == 2
