"""The fields of a chat that offer tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_TOOLS = 128
"""As at OpenAI."""

Name = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(Struct, kw_only=True, forbid_unknown_fields=True):
    name: Name
    description: str | None = None
    parameters: Annotated[dict[str, Any], Meta(description="JSON schema of the arguments, an object's.")] | None = None
    strict: Annotated[bool, Meta(description="Arguments are guaranteed to fit the schema. Default false.")] | None = None


class FunctionTool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class ChosenFunction(Struct, kw_only=True, forbid_unknown_fields=True):
    name: Name


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """The one function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


Tools = Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS, description="Functions that the answer may call.")]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
