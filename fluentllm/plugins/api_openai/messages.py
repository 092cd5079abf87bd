"""OpenAI's messages as chat templates expect them: plain dicts whose contents are strings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from fluentllm.core.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.frontend.templates import ChatTemplate

    from .schema import Message, ToolCall


def to_template(messages: Sequence[Message], template: ChatTemplate | None) -> list[dict[str, Any]]:
    """Raises `InvalidRequest` for what this model's template would drop without a word."""
    return [_convert(message, f"messages[{i}]", template) for i, message in enumerate(messages)]


def _convert(message: Message, where: str, template: ChatTemplate | None) -> dict[str, Any]:
    role = message.role
    if role == "developer" and template is not None and not template.knows_developer:
        role = "system"  # what OpenAI called it before
    result: dict[str, Any] = {"role": role, "content": _content(message)}
    if message.reasoning_content is not None:
        if role != "assistant":
            raise InvalidRequest(
                f"{where} is a {message.role}'s and has reasoning_content.", fix="Only an assistant reasons.", param=where
            )
        result["reasoning_content"] = message.reasoning_content
        result["content"] = result["content"] if message.content is not None or message.tool_calls else ""
    elif message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{where} has no content.", fix="Give it a string.", param=f"{where}.content")
    if message.tool_calls:
        if message.role != "assistant":
            raise InvalidRequest(
                f"{where} is a {message.role}'s and has tool_calls.", fix="Only an assistant calls.", param=where
            )
        if template is not None and not template.knows_tool_calls:
            raise InvalidRequest(
                f"{where} has tool_calls, but this model's chat template has no place for them.",
                fix="Leave them out.",
                param=f"{where}.tool_calls",
            )
        result["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    if message.tool_call_id is not None:
        if message.role != "tool":
            raise InvalidRequest(
                f"{where} is a {message.role}'s and has a tool_call_id.", fix="Only a tool answers a call.", param=where
            )
        result["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        if template is not None and not template.knows_names:
            raise InvalidRequest(
                f"{where} has a name, but this model's chat template prints none.",
                fix="Put the name into the content.",
                param=f"{where}.name",
            )
        result["name"] = message.name
    return result


class Arguments(dict[str, Any]):
    """Of a call. Some templates write them as JSON by a filter, others add them to text: either way JSON is what they get."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def _content(message: Message) -> str | None:
    if message.content is None or isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    """Templates want the arguments as an object, OpenAI sends it as text."""
    try:
        arguments = Arguments(msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any]))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"{where}.function.arguments is not a JSON object: {error}.", fix="Send it as the model wrote it.", param=where
        ) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
