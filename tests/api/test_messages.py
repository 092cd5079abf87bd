"""Messages as templates get them: calls of tools, and reasoning."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from fluentllm.core.errors import InvalidRequest
from fluentllm.frontend.messages import Message, chat_of, to_template
from fluentllm.frontend.templates import ChatTemplate

CALLS = "{% for m in messages %}{% for c in m.tool_calls %}{{ WRITTEN }}{% endfor %}{% endfor %}"
ARGUMENTS = '{"city": "Zürich", "days": [1, null]}'


def called(arguments: str) -> list[Message]:
    call = {"id": "call_1", "function": {"name": "f", "arguments": arguments}}
    return msgspec.convert([{"role": "assistant", "tool_calls": [call]}], list[Message])


@pytest.mark.parametrize(
    "written",
    [
        "c.function.arguments | tojson",
        "'<' + c.function.arguments + '>'",
        "c.function.arguments",
        "'<' ~ c.function.arguments",
        "'{\"city\": \"' + c.function.arguments.city + '\", ' + '\"days\": [1, null]}'",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    ],
)
def test_arguments_are_json_however_a_template_writes_them(written: str) -> None:
    template = ChatTemplate(CALLS.replace("WRITTEN", written))
    assert template.render(to_template(called(ARGUMENTS), template)).strip("<>") == ARGUMENTS


def test_no_arguments_are_an_empty_object() -> None:
    template = ChatTemplate(CALLS.replace("WRITTEN", "c.function.arguments | tojson"))
    assert template.render(to_template(called(""), template)) == "{}"


@pytest.mark.parametrize("cut", ['{"city": "Zü', "{", "[]", "3"])
def test_arguments_that_a_model_left_unfinished_can_be_sent_back(cut: str) -> None:
    plain = ChatTemplate(CALLS.replace("WRITTEN", "c.function.arguments"))
    assert plain.render(to_template(called(cut), plain)) == cut
    as_json = ChatTemplate(CALLS.replace("WRITTEN", "c.function.arguments | tojson"))
    assert json.loads(as_json.render(to_template(called(cut), as_json))) == cut


def test_a_tools_name_is_said_by_the_call_that_it_answers() -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": "Sunny"}
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.tool_call_id }}{% endfor %}")
    assert chat_of([answer], template) == [{key: value for key, value in answer.items() if key != "name"}]
    printing = ChatTemplate("{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}")
    assert chat_of([answer], printing) == [answer]
    with pytest.raises(InvalidRequest, match="prints none"):
        chat_of([{"role": "user", "name": "Ada", "content": "Hi"}], template)


def test_messages_as_they_are_written() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat_of([{"role": "user", "content": parts}], None) == [{"role": "user", "content": "a\nb"}]
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert chat_of([{"role": "developer", "content": "x"}], template) == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: Expected"),
        ([{"role": "bob", "content": "x"}], r"messages\[0\]\.role: Invalid enum value 'bob'"),
        ([{"content": "x"}], r"messages\[0\]: .*role"),
        ([{"role": "user", "content": {"a": 1}}], r"messages\[0\]\.content"),
        ([{"role": "user"}], "has no content"),
    ],
)
def test_what_is_no_message_is_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        chat_of(messages, None)


def test_reasoning_reaches_the_template() -> None:
    fields: dict[str, Any] = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    [message] = to_template(msgspec.convert([fields], list[Message]), None)
    assert message == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
