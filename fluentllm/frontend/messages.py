"""OpenAI's messages as chat templates expect them: plain dicts whose contents are strings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..core.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .templates import ChatTemplate


class TextPart(Struct, kw_only=True, forbid_unknown_fields=True):
    text: str
    type: Literal["text"]


class FunctionCall(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    arguments: Annotated[str, Meta(description="A JSON object, as text.")]


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn. What a role may hold is checked by the chat template of the model."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Meta(description="Of the speaker, if the model's template prints names.")] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(description="An assistant's earlier calls.")] | None = None
    tool_call_id: Annotated[str, Meta(description="The call that a tool message answers.")] | None = None
    reasoning_content: Annotated[str, Meta(description="An assistant's; most templates leave it out.")] | None = None
    # What an answer of the API holds, so that it can be sent back as it came.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


def chat_of(messages: Sequence[Mapping[str, Any]], template: ChatTemplate | None) -> list[dict[str, Any]]:
    """As `to_template`, of messages as they are written. Raises `InvalidRequest` for what is no message, too."""
    if not messages:
        raise InvalidRequest("There are no messages.", fix="Send at least one.", param="messages")
    try:
        return to_template(msgspec.convert(list(messages), list[Message]), template)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        where = "messages" + place.strip("`").removeprefix("$")
        raise InvalidRequest(f"{where}: {reason}.", fix="Write them as OpenAI's chat API takes them.", param=where) from None


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
        result["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        if message.role != "tool":
            raise InvalidRequest(
                f"{where} is a {message.role}'s and has a tool_call_id.", fix="Only a tool answers a call.", param=where
            )
        result["tool_call_id"] = message.tool_call_id
    # Which tool it was is said by the call that it answers.
    shown = template is None or template.knows_names
    if message.name is not None and (shown or message.role != "tool"):
        if not shown:
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


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Templates want the arguments as an object, OpenAI sends it as text; what a model wrote need not be one, as when it was
    cut."""
    arguments: dict[str, Any] | str
    try:
        arguments = Arguments(msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any]))
    except (msgspec.DecodeError, RecursionError):
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
