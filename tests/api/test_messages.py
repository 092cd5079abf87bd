"""Messages as templates get them: calls of tools, and reasoning."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fluentllm.core.errors import InvalidRequest
from fluentllm.frontend.templates import ChatTemplate
from fluentllm.plugins.api_openai.messages import to_template
from fluentllm.plugins.api_openai.schema import Message

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
    for broken in ("[]", "{", "3"):
        with pytest.raises(InvalidRequest, match="is not a JSON object"):
            to_template(called(broken), template)


def test_reasoning_reaches_the_template() -> None:
    fields: dict[str, Any] = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    [message] = to_template(msgspec.convert([fields], list[Message]), None)
    assert message == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
