"""What a chat asks for with `tools`, `tool_choice` and `parallel_tool_calls`, checked against what the model can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from fluentllm.core.errors import InvalidRequest
from fluentllm.core.protocols import CallRules, Tool

from .tool_schema import NamedTool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.protocols import AnswerFormat, Where
    from fluentllm.core.types import GrammarSpec
    from fluentllm.frontend.services import Services
    from fluentllm.frontend.templates import ChatTemplate

    from .schema import ChatRequest
    from .tool_schema import Function, FunctionTool

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class Calling(Struct, kw_only=True):
    """Tools that an answer may call."""

    format: AnswerFormat
    offered: list[dict[str, Any]]
    """As templates expect them."""
    tools: list[Tool]
    choice: list[Tool]
    """Those of them that a grammar lets be called."""
    required: bool
    parallel: bool
    otherwise: GrammarSpec | None
    """What the answer must be if it calls nothing."""
    field: str
    """That asks for a grammar, if one does; or both."""

    @property
    def guaranteed(self) -> bool:
        """A grammar sees to it that calls are as they must be."""
        return self.required or any(tool.strict for tool in self.choice)

    def grammar(self, where: Where) -> GrammarSpec | None:
        if not self.guaranteed and self.otherwise is None:
            return None
        rules = CallRules(required=self.required, parallel=self.parallel, where=where, otherwise=self.otherwise)
        return self.format.grammar(self.choice, rules)


def take_tools(body: ChatRequest, services: Services, field: str) -> Calling | None:
    """None if the answer calls nothing. `field`: that asked for `body.grammar`. Raises `InvalidRequest`."""
    if not body.tools:
        given = "tool_choice" if body.tool_choice not in (None, "none") else "parallel_tool_calls"
        if getattr(body, given) not in (None, "none"):
            raise InvalidRequest(f"{given} is given, but no tools are.", fix="Leave it out, or offer tools.", param=given)
        return None
    check_tools(body.tools)
    tools = [_tool(tool.function) for tool in body.tools]
    choice = body.tool_choice or "auto"
    chosen = _named(tools, choice.function.name) if isinstance(choice, NamedTool) else tools
    if choice == "none":
        return None
    offered = template_tools(body.tools, services.generation.template)
    if services.answers is None:
        known = services.settings.model.answer_format
        raise InvalidRequest(
            f"tools are given, but how this model writes calls is not known: model.answer_format is {known!r}.",
            fix="Start the server with the name of a format, or leave tools out.",
            param="tools",
        )
    strict = [f"tools[{number}].function.strict" for number, tool in enumerate(tools) if tool.strict]
    # One grammar is made of both: what is wrong with it may be in either.
    asking = ", ".join([*strict[:1], *([field] if body.grammar is not None else [])]) or field
    calling = Calling(
        format=services.answers,
        offered=offered,
        tools=tools,
        choice=chosen,
        required=choice != "auto",
        parallel=body.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        otherwise=body.grammar,
        field="tool_choice" if choice != "auto" else asking,
    )
    if calling.required and body.grammar is not None:
        raise InvalidRequest(
            f"{field} and {calling.field} each say what the text must be.",
            fix='Give one of them, or set tool_choice to "none".',
            param=calling.field,
        )
    return calling


def template_tools(tools: Sequence[FunctionTool], template: ChatTemplate | None) -> list[dict[str, Any]]:
    """As chat templates expect them. Raises `InvalidRequest` if this model's would drop them without a word."""
    if template is not None:
        template.check_tools()
    return [{"type": "function", "function": _described(tool.function)} for tool in tools]


def check_tools(tools: Sequence[FunctionTool]) -> None:
    """Raises `InvalidRequest` for two of one name, and for parameters that are no object's."""
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        where, function = f"tools[{number}].function", tool.function
        if function.name in seen:
            raise InvalidRequest(
                f"{where}.name = {function.name!r} is the name of another tool.", fix="Rename one.", param=f"{where}.name"
            )
        seen.add(function.name)
        kind = (function.parameters or NO_ARGUMENTS).get("type", "object")
        if kind != "object":
            raise InvalidRequest(
                f"{where}.parameters.type = {kind!r}, but arguments are an object.",
                fix="Wrap it in an object.",
                param=f"{where}.parameters",
            )


def _described(function: Function) -> dict[str, Any]:
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    return {**described, "parameters": function.parameters or NO_ARGUMENTS}


def _tool(function: Function) -> Tool:
    parameters = {"type": "object", **(function.parameters or NO_ARGUMENTS)}
    return Tool(name=function.name, parameters=parameters, strict=bool(function.strict))


def _named(tools: Sequence[Tool], name: str) -> list[Tool]:
    found = [tool for tool in tools if tool.name == name]
    if not found:
        raise InvalidRequest(
            f"tool_choice.function.name = {name!r} is not among the tools.",
            fix=f"There are: {', '.join(tool.name for tool in tools)}.",
            param="tool_choice",
        )
    return found
