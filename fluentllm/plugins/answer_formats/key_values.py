"""Arguments as keys and values in tags: which of them are text, and a structural tag of one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.errors import InvalidRequest

from .grammar import schema_node, sequence

if TYPE_CHECKING:
    from fluentllm.core.protocols import Tool

Tags = tuple[str, str]
_SAYS = {"pattern", "format", "minLength", "maxLength", "not", "anyOf", "oneOf", "allOf", "if"}
"""Of a text, beside its values in `enum` and `const`."""


def means_text(parameters: dict[str, Any], key: str) -> bool:
    """The schema says that this argument is a string."""
    schema = _follow(parameters, _properties(parameters).get(key))
    if schema.get("type") == "string":
        return True
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    return "type" not in schema and bool(values) and all(isinstance(value, str) for value in values)


def key_value_tag(tool: Tool, call: Tags, key: Tags, value: Tags) -> dict[str, Any]:
    """`call[0]NAME`, then each argument of the schema in its order, then `call[1]`. Raises `InvalidRequest` for what cannot be
    kept to of a function that is strict."""
    parts: list[dict[str, Any]] = []
    required = tool.parameters.get("required")
    for name in _properties(tool.parameters):
        argument = sequence(_constant(f"{key[0]}{name}{key[1]}\n{value[0]}"), *_value(tool, name, value[1]), _constant("\n"))
        needed = isinstance(required, list) and name in required
        parts.append(argument if needed else {"type": "optional", "content": argument})
    if tool.strict:
        for name in required if isinstance(required, list) else ():
            if name not in _properties(tool.parameters):
                raise _refused(tool, "required", f"{name!r} is not among the properties")
    return {"type": "tag", "begin": f"{call[0]}{tool.name}\n", "content": sequence(*parts), "end": call[1]}


def _value(tool: Tool, name: str, end: str) -> list[dict[str, Any]]:
    schema = _follow(tool.parameters, _properties(tool.parameters)[name])
    if not means_text(tool.parameters, name):
        definitions: dict[str, Any] = {
            word: tool.parameters[word] for word in ("$defs", "definitions") if word in tool.parameters
        }
        return [schema_node({**definitions, **schema}, strict=tool.strict), _constant(end)]
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    if values is not None:
        texts = [text for text in values if isinstance(text, str) and end not in text]
        return [{"type": "or", "elements": [_constant(f"{text}{end}") for text in texts]}]
    if tool.strict and _SAYS & set(schema):
        raise _refused(tool, f"properties.{name}.{min(_SAYS & set(schema))}", "this model writes the value as plain text")
    return [{"type": "tag", "begin": "", "content": {"type": "any_text", "excludes": [end]}, "end": end}]


def _properties(parameters: dict[str, Any]) -> dict[str, Any]:
    properties = parameters.get("properties")
    return properties if isinstance(properties, dict) else {}


def _follow(parameters: dict[str, Any], schema: Any) -> dict[str, Any]:
    """The schema itself, or the definition that it refers to."""
    for _ in range(8):
        pointer = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(pointer, str) or not pointer.startswith("#/"):
            break
        target: Any = parameters
        for step in pointer.split("/")[1:]:
            target = target.get(step) if isinstance(target, dict) else None
        schema = target
    return schema if isinstance(schema, dict) else {}


def _constant(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def _refused(tool: Tool, where: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The parameters of {tool.name!r} cannot be kept to: {where}: {why}.",
        fix="Leave it out, or leave out strict.",
        param="grammar",
    )
