"""Any answer, however it is cut, in every format: the same pieces, and nothing lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fluentllm.core.protocols import Tool, Where

from .reading import NAMES, TOOLS, format_of, read

SCRAPS = {
    "hermes": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    "longcat": [
        "<longcat_tool_call>", "</longcat_tool_call>", "<longcat_arg_key>", "</longcat_arg_key>", "<longcat_arg_value>",
        "</longcat_arg_value>", "<longcat_think>", "</longcat_think>", "<longcat_tool_call>time\n",
    ],
    "llama3_json": ["<|python_tag|>", "; "],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[TOOL_CALLS][", "]", ", "],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>", "<｜tool▁sep｜>", "\n```json\n", "\n```",
        "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<think>", "</think>",
    ],
}  # fmt: skip
COMMON = [
    '{"name": "time", "arguments": ', '{"name": "get_weather", "parameters": {"city": "Paris"}}', '{"a": "}"}', "{}", "}",
    '{"arguments": {"x": [1]}, "name": "time"}', "time", " ", "\n", '"', "\\", "{", "[", ",", "Hello", "<", "é",
]  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str, list[str]]:
    """A format, an answer made of scraps of it, and the answer cut anyhow."""
    name = draw(st.sampled_from(NAMES))
    scraps = draw(st.lists(st.sampled_from(SCRAPS[name] + COMMON), max_size=12))
    text = "".join(scraps)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=10)))
    return name, text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(answers(), st.sampled_from(["before", "inside", "behind"]), st.booleans())
@settings(max_examples=1500, deadline=None)
def test_the_same_pieces_however_it_is_cut(answer: tuple[str, str, list[str]], where: Where, separate: bool) -> None:
    name, text, chunks = answer
    whole = read(name, [text], where=where, separate=separate)
    assert read(name, chunks, where=where, separate=separate) == whole
    assert read(name, text, where=where, separate=separate) == whole


@given(answers(), st.sampled_from(["before", "inside", "behind"]))
@settings(max_examples=600, deadline=None)
def test_nothing_is_lost(answer: tuple[str, str, list[str]], where: Where) -> None:
    """Where no call is found and no reasoning is told apart, the answer is what was written; else what is given beside calls
    was written, in this order."""
    name, text, chunks = answer
    pieces = read(name, chunks, where=where, separate=False)
    if all(piece.kind == "content" for piece in pieces):
        assert "".join(piece.text for piece in pieces) == text
    at = 0
    for piece in read(name, chunks, where=where):
        if piece.kind in ("content", "reasoning"):
            found = text.find(piece.text, at)
            assert found >= 0, (piece, text)
            at = found + len(piece.text)


@given(st.sampled_from(NAMES), st.text(st.characters(exclude_characters="<[{"), max_size=200), st.integers(1, 7))
@settings(deadline=None)
def test_text_without_markers_comes_as_it_is(name: str, text: str, size: int) -> None:
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    assert "".join(piece.text for piece in read(name, chunks)) == text
    assert {piece.kind for piece in read(name, chunks)} <= {"content"}


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


AROUND = [
    ("hermes", '<tool_call>\n{"name": "time", "arguments": %s}\n</tool_call>'),
    ("longcat", '<longcat_tool_call>{"name": "time", "arguments": %s}</longcat_tool_call>'),
    ("llama3_json", '{"name": "time", "parameters": %s}'),
    ("mistral", '[TOOL_CALLS][{"name": "time", "arguments": %s}]'),
    ("mistral", "[TOOL_CALLS]time[ARGS]%s"),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n%s\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
    ),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
]
objects = st.dictionaries(st.text(max_size=6), json_values, max_size=4)


@given(st.sampled_from(AROUND), objects, st.sampled_from([None, 2]), st.integers(1, 9))
@settings(max_examples=400, deadline=None)
def test_arguments_come_as_they_were_written(
    around: tuple[str, str], arguments: dict[str, Any], indent: int | None, size: int
) -> None:
    name, pattern = around
    written = json.dumps(arguments, ensure_ascii=False, indent=indent)
    text = pattern % written
    pieces = read(name, [text[at : at + size] for at in range(0, len(text), size)])
    assert pieces == [("call", "time"), ("arguments", written), ("end", "")]


@given(st.dictionaries(st.text("abc_", min_size=1, max_size=6), json_values, max_size=4), st.integers(1, 9))
@settings(deadline=None)
def test_keys_and_values_make_an_object(arguments: dict[str, Any], size: int) -> None:
    tool = Tool(
        name="f", parameters={"properties": {k: {"type": "string"} for k, v in arguments.items() if isinstance(v, str)}}
    )
    text = "<longcat_tool_call>f\n"
    for key, value in arguments.items():
        written = value if isinstance(value, str) else json.dumps(value)
        text += f"<longcat_arg_key>{key}</longcat_arg_key>\n<longcat_arg_value>{written}</longcat_arg_value>\n"
    text += "</longcat_tool_call>"
    pieces = read("longcat", [text[at : at + size] for at in range(0, len(text), size)], tools=[tool])
    assert [piece.kind for piece in pieces] == ["call", "arguments", "end"]
    assert json.loads(pieces[1].text) == arguments


@pytest.mark.parametrize("name", NAMES)
def test_content_is_not_held_back_for_long(name: str) -> None:
    """Only what may still become a marker, and the white space before it."""
    parser = format_of(name).parser(TOOLS, where="behind", separate_reasoning=True)
    longest = max(map(len, format_of(name).markers))
    text, given_so_far = "Paris is < the [capital of { France. " * 3, 0
    for number, char in enumerate(text):
        given_so_far += sum(len(piece.text) for piece in parser.feed(char))
        assert number + 1 - given_so_far <= longest + 1
