"""Answers as models write them, in every format: calls, reasoning, and what is broken."""

from __future__ import annotations

import pytest

from .reading import NAMES, call, format_of, read

PARIS = '{"city": "Paris"}'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CHAT = '<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</longcat_tool_call>'
LITE = """<longcat_tool_call>get_weather
<longcat_arg_key>city</longcat_arg_key>
<longcat_arg_value>Paris</longcat_arg_value>
<longcat_arg_key>days</longcat_arg_key>
<longcat_arg_value>3</longcat_arg_value>
</longcat_tool_call>"""
V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V31 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
BOTH = [*call("get_weather", PARIS), *call("time", "{}")]

GOOD = [
    ("hermes", HERMES, call("get_weather", PARIS)),
    ("hermes", f'Let me look.\n{HERMES}\n<tool_call>{{"name":"time","arguments":{{}}}}</tool_call>\n',
     [("content", "Let me look."), *BOTH]),
    ("hermes", f"{HERMES}\nThere.", [*call("get_weather", PARIS), ("content", "There.")]),
    ("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', call("get_weather", PARIS)),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', call("time", "{}")),
    ("hermes", '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>', call("time", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>', call("get_weather", PARIS)),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}, "id": {"x": "}"}}</tool_call>!',
     [*call("time", "{}"), ("content", "!")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "a\\"}</tool_call>", "t": [{}, "]"]}}</tool_call>',
     call("f", '{"s": "a\\"}</tool_call>", "t": [{}, "]"]}')),
    ("longcat", CHAT, call("get_weather", PARIS)),
    ("longcat", f"{CHAT}\n{LITE}", [*call("get_weather", PARIS), *call("get_weather", '{"city": "Paris", "days": 3}')]),
    ("longcat", f"Sure.{LITE}", [("content", "Sure."), *call("get_weather", '{"city": "Paris", "days": 3}')]),
    ("longcat", "<longcat_tool_call>time\n</longcat_tool_call>", call("time", "{}")),
    ("longcat", "<longcat_tool_call>time<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>[1, {}]</longcat_arg_value>"
     "</longcat_tool_call>", call("time", '{"a": [1, {}]}')),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', call("get_weather", PARIS)),
    ("llama3_json", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
     '{"name": "time", "parameters": {}}', BOTH),
    ("llama3_json", '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', call("get_weather", PARIS)),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', call("get_weather", PARIS)),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
     '{"name": "time", "arguments": {}}]', BOTH),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[ARGS]{}', BOTH),
    ("mistral", 'Hm. [TOOL_CALLS]get_weather{"city": "Paris"}', [("content", "Hm."), *call("get_weather", PARIS)]),
    ("deepseek_v3", V3, call("get_weather", PARIS)),
    ("deepseek_v3", V31, BOTH),
    ("deepseek_v3", V31.replace("<｜tool▁call▁begin｜>time", "\n<｜tool▁call▁begin｜>time"), BOTH),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), GOOD, ids=[f"{name} {n}" for n, (name, _, _) in enumerate(GOOD)])
def test_calls(name: str, text: str, expected: list[tuple[str, str]]) -> None:
    assert read(name, [text]) == expected
    assert read(name, text) == expected
    assert read(name, [text], tools=()) == [("content", text)]


def test_every_format_has_examples() -> None:
    assert {name for name, _, _ in GOOD} == set(NAMES)


def test_values_are_text_where_the_schema_says_so_and_json_otherwise() -> None:
    written = {"city": "3", "days": "3", "zip": "007", "other": "007", "more": '{"a": [null]}', "nan": "NaN"}
    text = "".join(
        f"<longcat_arg_key>{key}</longcat_arg_key>\n<longcat_arg_value>{value}</longcat_arg_value>\n"
        for key, value in written.items()
    )
    [_, (_, arguments), _] = read("longcat", f"<longcat_tool_call>get_weather\n{text}</longcat_tool_call>")
    assert arguments == '{"city": "3", "days": 3, "zip": "007", "other": "007", "more": {"a": [null]}, "nan": "NaN"}'


BROKEN = [
    ("hermes", "<tool_call> is how a call begins."),
    ("hermes", '<tool_call>{"nme": "f"}</tool_call> and so on'),
    ("hermes", '<tool_call>{"name": "f", "arguments": 3}</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "get_wea'),
    ("hermes", "a <tool_cal"),
    ("longcat", "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Par"),
    ("longcat", "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\nParis</longcat_tool_call>"),
    ("longcat", "<longcat_tool_call>get weather</longcat_tool_call>"),
    ("longcat", "<longcat_tool_call></longcat_tool_call>"),
    ("llama3_json", '{"name": "Ada", "parameters": {"born": 1815}}'),
    ("llama3_json", '{"city": "Paris"}'),
    ("llama3_json", 'It is {"name": "time", "parameters": {}}'),
    ("llama3_json", '<|python_tag|>time.call(zone="CET")'),
    ("mistral", "[TOOL_CALLS] are what you want"),
    ("mistral", '[TOOL_CALLS][{"nome": "f"}]'),
    ("mistral", "[TOOL_CALLS][]"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n{no fence}"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather{}"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert read(name, [text]) == read(name, text) == [("content", text)]


def test_behind_a_broken_call_there_may_be_a_good_one() -> None:
    text = f"<tool_call>{{}}</tool_call>{HERMES}"
    assert read("hermes", text) == [("content", "<tool_call>{}</tool_call>"), *call("get_weather", PARIS)]
    text = '[TOOL_CALLS][{"name": "time", "arguments": {}}, {"nome": 1}] so'
    assert read("mistral", text) == [*call("time", "{}"), ("content", ', {"nome": 1}] so')]


def test_a_call_that_is_cut_off_has_no_end() -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    assert read("hermes", text) == [("call", "get_weather"), ("arguments", '{"city": "Par')]


THOUGHTS = [
    ("hermes", "<think>", "</think>"),
    ("longcat", "<longcat_think>", "</longcat_think>"),
    ("deepseek_v3", "<think>", "</think>"),
]


@pytest.mark.parametrize(("name", "begin", "end"), THOUGHTS)
def test_reasoning(name: str, begin: str, end: str) -> None:
    text = f"\n{begin}\nWell, <think\n\n{end}\n\nYes. {begin} is a marker."
    told = [("reasoning", "Well, <think"), ("content", f"Yes. {begin} is a marker.")]
    for tools in ((), None):
        given = {} if tools is None else {"tools": tools}
        assert read(name, [text], **given) == told  # type: ignore[arg-type]
        assert read(name, text, **given) == told  # type: ignore[arg-type]
        assert read(name, text, separate=False, **given) == [("content", text)]  # type: ignore[arg-type]
        inside = text.removeprefix(f"\n{begin}")
        assert read(name, inside, where="inside", **given) == told  # type: ignore[arg-type]
        assert read(name, text, where="behind", **given) == [("content", text)]  # type: ignore[arg-type]
    assert read(name, f"{begin}cut o") == [("reasoning", "cut o")]
    assert read(name, f" {begin[:-1]}") == [("content", f" {begin[:-1]}")]
    made = format_of(name)
    assert made.where(f"Hi\n{begin}\n") == "inside"
    assert made.where(f"Hi\n{begin}\n\n{end}\n\n") == "behind"
    assert made.where("Hi\n") == "before"
    assert {begin, end} <= made.markers


def test_a_call_is_none_before_the_reasoning_ends() -> None:
    text = f"<think>Like {HERMES}?</think>{HERMES}"
    assert read("hermes", text) == [("reasoning", f"Like {HERMES}?"), *call("get_weather", PARIS)]
    unseparated = read("hermes", text, separate=False)
    assert unseparated == [("content", f"<think>Like {HERMES}?</think>"), *call("get_weather", PARIS)]


@pytest.mark.parametrize("name", NAMES)
def test_once_nothing_but_content_can_come_nobody_needs_to_look(name: str) -> None:
    parser = format_of(name).parser((), where="before", separate_reasoning=True)
    assert parser.feed("Hello") == [("content", "Hello")]
    assert parser.plain
    assert not format_of("hermes").parser((), where="inside", separate_reasoning=True).plain
