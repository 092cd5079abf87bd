"""Tool calls and reasoning over HTTP, in answers given beforehand: what comes out, whole and streamed, in every format."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from fluentllm.plugins.api_openai.answers import ChatChunk, ChatCompletion

from .conftest import Api, serving_echo
from .tools import CITY, SPECIAL, TEMPLATES, TIME, TOOLS, write_model

CHAT = "/v1/chat/completions"
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
PARIS = '{"city": "Paris"}'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f'Both.\n{HERMES}\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>'
ANSWERS = {
    "hermes": HERMES,
    "longcat": '<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</longcat_tool_call>',
    "lite": "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
    "<longcat_arg_value>Paris</longcat_arg_value>\n</longcat_tool_call>",
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "deepseek_v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
}


@pytest.fixture
async def hermes(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving_echo(write_model(tmp_path, "hermes"), context=2048) as api:
        yield api


def says(api: Api, text: str) -> None:
    api.engine.reply = api.services.tokenizer.encode(text)


def prompt_of(api: Api) -> str:
    return api.services.tokenizer.decode(api.engine.requests[-1].prompt, skip_special_tokens=False)


async def both_ways(api: Api, **fields: Any) -> dict[str, Any]:
    """The first choice, which must be the same whole and streamed; without the ids of its calls."""
    whole = await api.post(CHAT, **{"messages": HI, **fields})
    msgspec.convert(whole, ChatCompletion, strict=True)
    events = await api.events(CHAT, **{"messages": HI, **fields})
    choices = [{"message": {"role": None, "content": None}, "finish_reason": None} for _ in whole["choices"]]
    for event in events:
        msgspec.convert(event, ChatChunk, strict=True)
        [chunk] = event["choices"]
        take(choices[chunk["index"]], chunk)
    for one, streamed in zip(whole["choices"], choices, strict=True):
        for call in one["message"].get("tool_calls", []) + streamed["message"].get("tool_calls", []):
            assert call.pop("id").startswith("call_")
            assert call.pop("type") == "function"
        assert streamed["finish_reason"] == one["finish_reason"]
        expected = {key: value for key, value in one["message"].items() if key != "refusal"}
        assert {**streamed["message"], "content": streamed["message"]["content"] or expected["content"]} == expected
    first: dict[str, Any] = whole["choices"][0]
    return first


def take(choice: dict[str, Any], chunk: dict[str, Any]) -> None:
    """Adds a chunk to what came before, as clients do."""
    message, delta = choice["message"], chunk["delta"]
    assert choice["finish_reason"] is None
    choice["finish_reason"] = chunk["finish_reason"]
    assert ("role" in delta) == (message["role"] is None)
    message["role"] = message["role"] or delta["role"]
    for field in ("content", "reasoning_content"):
        if delta.get(field) is not None:
            message[field] = (message.get(field) or "") + delta[field]
    for call in delta.get("tool_calls", []):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            assert call["index"] == len(calls)
            assert call["function"]["arguments"] == ""
            calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
        else:
            assert set(call) == {"index", "function"}
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("step", [1, 3, 100])
async def test_every_format(name: str, step: int, tmp_path: Path) -> None:
    async with serving_echo(write_model(tmp_path, name), context=2048) as api:
        says(api, ANSWERS[name])
        api.engine.steps = [step]
        choice = await both_ways(api, tools=TOOLS)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"] == [{"function": {"name": "get_weather", "arguments": PARIS}}]
        offered = '<tools>[{"type": "function", "function": {"name": "get_weather", "description": "Today\'s.", "parameters":'
        assert prompt_of(api).startswith(offered)
        assert api.services.answers is not None
        assert ANSWERS[name][:10] in "".join(sorted(api.services.answers.markers)) + ANSWERS["llama3_json"]
        called = {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_123456789", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}]}  # fmt: skip
        told = {"role": "tool", "tool_call_id": "call_123456789", "content": "Sunny."}
        says(api, "Sunny, it says.")
        choice = await both_ways(api, messages=[*HI, called, told], tools=TOOLS)
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Sunny, it says.", "stop")
        assert "tool_calls" not in choice["message"]
        assert f"get_weather {PARIS}" in prompt_of(api)


async def test_a_call_that_a_stop_string_cuts_is_none_that_could_be_made(hermes: Api) -> None:
    says(hermes, ANSWERS["hermes"])
    choice = await both_ways(hermes, tools=TOOLS, stop="Paris")
    assert choice["finish_reason"] == "stop"
    [call] = choice["message"]["tool_calls"]
    assert "Paris" not in call["function"]["arguments"]
    sent_back = {**choice["message"], "role": "assistant", "tool_calls": [{**call, "id": "call_1", "type": "function"}]}
    says(hermes, "Once more.")
    choice = await both_ways(hermes, messages=[*HI, sent_back, {"role": "tool", "tool_call_id": "call_1", "content": "?"}])
    assert choice["message"]["content"] == "Once more."


async def test_arguments_are_streamed_while_they_are_written(hermes: Api) -> None:
    says(hermes, TWO)
    events = await hermes.events(CHAT, messages=HI, tools=TOOLS)
    deltas = [event["choices"][0]["delta"] for event in events]
    called = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert len(called) > 5
    assert [call["index"] for call in called] == sorted(call["index"] for call in called)
    assert deltas[0] == {"role": "assistant", "content": deltas[0]["content"]}
    assert deltas[-1] == {}
    choice = await both_ways(hermes, tools=TOOLS)
    assert choice["message"]["content"] == "Both."
    assert choice["message"]["tool_calls"] == [
        {"function": {"name": "get_weather", "arguments": PARIS}},
        {"function": {"name": "time", "arguments": "{}"}},
    ]


async def test_one_call_at_most(hermes: Api) -> None:
    says(hermes, f"{TWO} Done.")
    choice = await both_ways(hermes, tools=TOOLS, parallel_tool_calls=False)
    assert choice["message"]["tool_calls"] == [{"function": {"name": "get_weather", "arguments": PARIS}}]
    assert choice["message"]["content"] == "Both.Done."


async def test_several_choices(hermes: Api) -> None:
    says(hermes, TWO)
    hermes.engine.steps = [4]
    choice = await both_ways(hermes, tools=TOOLS, n=3, stop="nowhere")
    assert len(choice["message"]["tool_calls"]) == 2


async def test_without_tools_a_call_is_text(hermes: Api) -> None:
    says(hermes, HERMES)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        choice = await both_ways(hermes, **fields)
        assert (choice["message"]["content"], choice["finish_reason"]) == (HERMES, "stop")
        assert "tool_calls" not in choice["message"]
        assert "<tools>" not in prompt_of(hermes)


async def test_what_is_no_call_comes_out_as_text(hermes: Api) -> None:
    for text in ("Nothing to call.", '<tool_call>{"nam": 1}</tool_call>', "a <tool_cal", " \n"):
        says(hermes, text)
        choice = await both_ways(hermes, tools=TOOLS)
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert "tool_calls" not in choice["message"]


async def test_a_call_that_is_cut_off(hermes: Api) -> None:
    says(hermes, HERMES)
    cut = len(hermes.services.tokenizer.encode('ris"}}\n</tool_call>'))
    choice = await both_ways(hermes, tools=TOOLS, max_tokens=len(hermes.engine.reply) - cut)
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert PARIS.startswith(call["function"]["arguments"])


async def test_reasoning(hermes: Api) -> None:
    says(hermes, f"<think>\nWell, well.\n</think>\n\nYes. {HERMES}")
    choice = await both_ways(hermes)
    assert choice["message"] == {
        "role": "assistant", "content": f"Yes. {HERMES}", "reasoning_content": "Well, well.", "refusal": None,
    }  # fmt: skip
    choice = await both_ways(hermes, tools=TOOLS)
    assert choice["message"]["reasoning_content"] == "Well, well."
    assert choice["message"]["content"] == "Yes."
    assert choice["message"]["tool_calls"] == [{"function": {"name": "get_weather", "arguments": PARIS}}]
    choice = await both_ways(hermes, separate_reasoning=False, stream_reasoning=True)
    assert choice["message"]["content"].startswith("<think>\nWell, well.\n</think>\n\nYes.")
    assert "reasoning_content" not in choice["message"]
    says(hermes, "Well, well.\n</think>Yes.")
    choice = await both_ways(hermes, chat_template_kwargs={"thinking": True})
    assert prompt_of(hermes).endswith("<think>\n")
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Well, well.", "Yes.")
    choice = await both_ways(hermes, chat_template_kwargs={"thinking": True}, max_tokens=3)
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")
    messages = [*HI, choice["message"], {"role": "user", "content": "Go on."}]
    await hermes.post(CHAT, messages=messages)  # what came can be sent back


async def test_an_answer_by_a_grammar_is_no_reasoning(hermes: Api) -> None:
    says(hermes, '{"a": 1}')
    thinks: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}, "response_format": {"type": "json_object"}}
    choice = await both_ways(hermes, **thinks)
    assert choice["message"] == {"role": "assistant", "content": '{"a": 1}', "refusal": None}
    says(hermes, 'Hm.</think>{"a": 1}')
    choice = await both_ways(hermes, **thinks, tools=TOOLS)  # then it may come first
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", '{"a": 1}')
    source = msgspec.json.decode(hermes.engine.requests[-1].params.grammar.source)
    assert [part["type"] for part in source["format"]["elements"]] == ["tag", "or"]


async def test_logprobs_come_with_the_pieces(hermes: Api) -> None:
    says(hermes, f"<think>Hm.</think>Yes.{HERMES}")
    fields = {"messages": HI, "tools": TOOLS, "logprobs": True}
    whole = (await hermes.post(CHAT, **fields))["choices"][0]["logprobs"]["content"]
    told = [
        entry
        for event in await hermes.events(CHAT, **fields)
        if event["choices"][0]["logprobs"] is not None
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert told == whole
    assert len(told) == len(hermes.engine.reply)


async def test_markers_may_be_special_tokens(tmp_path: Path) -> None:
    async with serving_echo(write_model(tmp_path, "longcat"), context=2048) as api:
        tokenizer = api.services.tokenizer
        ids = [tokenizer.backend.token_to_id(text) for text in SPECIAL]
        assert set(ids) <= tokenizer.special_ids
        assert api.services.markers == frozenset(ids[:4])
        call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
        says(api, f"<longcat_think>Hm.</longcat_think>Yes<longcat_other>.<longcat_tool_call>{call}</longcat_tool_call>")
        choice = await both_ways(api, tools=TOOLS)
        assert choice["message"]["reasoning_content"] == "Hm."
        assert choice["message"]["content"] == "Yes."
        assert choice["message"]["tool_calls"] == [{"function": {"name": "get_weather", "arguments": PARIS}}]
        text = await api.complete("Hi", max_tokens=100)
        assert text["choices"][0]["text"] == f"Hm.Yes.{call}"


async def test_the_openai_client_reads_it(hermes: Api) -> None:
    says(hermes, TWO)
    async with openai.AsyncOpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS)  # type: ignore[call-overload]
        calls = [call.function for call in answer.choices[0].message.tool_calls]
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", PARIS), ("time", "{}")]
        async with client.chat.completions.stream(model="tiny", messages=HI, tools=TOOLS) as stream:  # type: ignore[arg-type]
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        calls = [call.function for call in final.choices[0].message.tool_calls or []]
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", PARIS), ("time", "{}")]
        assert final.choices[0].finish_reason == "tool_calls"


async def test_tokenize_counts_tools(hermes: Api) -> None:
    await hermes.post(CHAT, messages=HI, tools=TOOLS)
    counted = await hermes.post("/tokenize", messages=HI, tools=TOOLS)
    assert counted["tokens"] == list(hermes.engine.requests[-1].prompt)
    error = await hermes.error("/tokenize", status=400, prompt="x", tools=TOOLS)
    assert error["param"] == "tools"


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # fields, param, words of the message
    ({"tools": [function(name="get weather")]}, "tools[0].function.name", '"get weather"'),
    ({"tools": [function(name="x" * 65)]}, "tools[0].function.name", "matching regex"),
    ({"tools": [function(), function()]}, "tools[1].function.name", "'f' is the name of another"),
    ({"tools": [function(parameters={"type": "array"})]}, "tools[0].function.parameters", "'array'"),
    ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "[]"),
    ({"tools": [function(paramters=CITY)]}, "tools[0].function.paramters", "'parameters'"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "Use function."),
    ({"tools": [TIME] * 129}, "tools", "length <= 128"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "auto or none or required"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "get_weather, time"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "time"}}, "tool_choice.name", "not known"),
    ({"tool_choice": "auto"}, "tool_choice", "no tools are"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "no tools are"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "no tools are"),
    ({"tools": TOOLS, "grammar": {"kind": "table", "source": ""}}, "grammar", "leaves no room for calls"),
    ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice", "regex and tool_choice each say"),
    ({"tools": [function(strict=True)], "grammar": {"kind": "table", "source": ""}}, "tools[0].function.strict, grammar",
     "leaves no room for calls"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "never part of the text"),
    ({"use_beam_search": True}, "use_beam_search", "= true is not supported: answers are drawn"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", "= false is not supported"),
    ({"return_token_ids": True}, "return_token_ids", "answers are text"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "are text"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ({"function_call": "auto"}, "function_call", "not supported"),
    ({"stream_reasoning": False}, "stream_reasoning", "as it comes"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "messages[0]", "Only an assistant"),
]  # fmt: skip


async def test_what_is_wrong_is_told_by_its_field(hermes: Api) -> None:
    for fields, param, words in REFUSED:
        for stream in (False, True):
            error = await hermes.error(CHAT, status=400, **{"messages": HI, "stream": stream, **fields})
            assert error["param"] == param, error
            assert words in error["message"], error
    assert not hermes.engine.requests


async def test_fields_of_others_that_ask_for_nothing_are_taken(hermes: Api) -> None:
    nothing = {
        "include_stop_str_in_output": False,
        "use_beam_search": False,
        "spaces_between_special_tokens": True,
        "return_token_ids": False,
        "return_tokens_as_token_ids": False,
    }
    says(hermes, "Hi.")
    assert (await both_ways(hermes, **nothing))["message"]["content"] == "Hi."
    await hermes.post("/v1/completions", prompt="Hi", **nothing)


async def test_a_model_without_a_place_for_tools(echo: Api) -> None:
    error = await echo.error(CHAT, status=400, messages=HI, tools=TOOLS)
    assert error["param"] == "tools"
    assert "model.chat_template" in error["message"]
    await echo.post(CHAT, messages=HI, tools=TOOLS, tool_choice="none")


async def test_a_model_whose_way_of_calling_is_not_known(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "hermes")
    async with serving_echo(folder, answer_format="none") as api:
        error = await api.error(CHAT, status=400, messages=HI, tools=TOOLS)
        assert error["param"] == "tools"
        assert "model.answer_format is 'none'" in error["message"]
        says(api, f"<think>Hm.</think>{HERMES}")
        choice = await both_ways(api)
        assert choice["message"]["content"] == f"<think>Hm.</think>{HERMES}"
