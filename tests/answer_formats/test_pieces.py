"""Any answer, however it is cut, in every format: the same pieces, and nothing lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fluentllm.core.protocols import Where

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


@given(
    st.sampled_from(["hermes", "longcat", "llama3_json"]),
    st.dictionaries(st.text(max_size=6), json_values, max_size=4),
    st.sampled_from([None, 2]),
    st.integers(1, 9),
)
@settings(deadline=None)
def test_arguments_come_as_they_were_written(name: str, arguments: dict[str, Any], indent: int | None, size: int) -> None:
    written = json.dumps(arguments, ensure_ascii=False, indent=indent)
    around = {
        "hermes": '<tool_call>\n{"name": "time", "arguments": %s}\n</tool_call>',
        "longcat": '<longcat_tool_call>{"name": "time", "arguments": %s}</longcat_tool_call>',
        "llama3_json": '{"name": "time", "parameters": %s}',
    }
    text = around[name] % written
    pieces = read(name, [text[at : at + size] for at in range(0, len(text), size)])
    assert pieces == [("call", "time"), ("arguments", written), ("end", "")]


@pytest.mark.parametrize("name", NAMES)
def test_content_is_not_held_back_for_long(name: str) -> None:
    """Only what may still become a marker, and the white space before it."""
    parser = format_of(name).parser(TOOLS, where="behind", separate_reasoning=True)
    longest = max(map(len, format_of(name).markers))
    text, given_so_far = "Paris is < the [capital of { France. " * 3, 0
    for number, char in enumerate(text):
        given_so_far += sum(len(piece.text) for piece in parser.feed(char))
        assert number + 1 - given_so_far <= longest + 1
