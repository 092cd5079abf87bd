"""From a request's bytes to its Struct; what does not fit is named: the field, the value seen, the nearest known name."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import inspect

from fluentllm.core.errors import InvalidRequest, ModelNotFound

from .schema import IGNORED, REFUSED, TEXT_ONLY_PARTS

if TYPE_CHECKING:
    from starlette.requests import Request

    from fluentllm.frontend.services import Services

T = TypeVar("T")

_UNKNOWN = re.compile(r"unknown field `(.*)`")
_PATH = re.compile(r" - at `(?:key in )?\$(.*)`$")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {}


async def read(request: Request, kind: type[T]) -> T:
    """Read and check the body. Raises `InvalidRequest`, `BodyTooLarge`."""
    body = await request.body()
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        decoded: T = decoder.decode(body)
        return decoded
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _undecodable(error, body, request.headers.get("content-encoding")) from None


def check_model(name: str | None, services: Services) -> None:
    """Raises `ModelNotFound` unless `name` is the served model, or left out."""
    if name is not None and name != services.model:
        raise ModelNotFound(f"The model {name!r} is not served here.", fix=f"Use {services.model!r}.", param="model")


def _undecodable(error: Exception, body: bytes, encoding: str | None) -> InvalidRequest:
    if encoding not in (None, "", "identity"):
        return InvalidRequest(f"The header Content-Encoding is {encoding!r}, which is not supported.", fix="Send plain JSON.")
    try:
        body.decode()
    except UnicodeDecodeError as invalid:
        return InvalidRequest(
            f"The body is not valid UTF-8: {invalid.reason} at byte {invalid.start}.", fix="Encode it as UTF-8."
        )
    return InvalidRequest(f"The body is not valid JSON: {error}.", fix="Send one JSON object.")


def _explain(message: str, body: bytes, kind: type) -> InvalidRequest:
    found = _PATH.search(message)
    steps = [name or number for name, number in _STEP.findall(found[1])] if found else []
    if steps and steps[-1] == "...":  # a value of a map, whose key the decoder does not tell
        steps.pop()
    text = message[: found.start()] if found else message
    where = _spell(steps)
    unknown = _UNKNOWN.search(text)
    if unknown is not None:
        return _unknown_field(unknown[1], steps, kind)
    if steps and steps[0] in REFUSED:
        seen = _seen(body, steps[:1])
        return InvalidRequest(
            f"{steps[0]} = {seen} is not supported: {REFUSED[steps[0]]}.", fix="Leave it out.", param=steps[0]
        )
    if text.startswith("Object missing required field"):
        field = text.split("`")[1]
        inside = f" of {where}" if where else ""
        return InvalidRequest(f"The field {field!r}{inside} is missing.", fix="Add it.", param=_spell([*steps, field]))
    if not steps:
        return InvalidRequest(f"The body is not as expected: {text}.", fix="Send one JSON object.")
    allowed = [
        str(value)
        for member in _walk(inspect.type_info(kind), steps)
        if isinstance(member, inspect.LiteralType)
        for value in member.values
    ]
    fix = f"Use {' or '.join(allowed)}." if allowed else "Correct it."
    if steps[-1] == "type" and "content" in steps:
        text = f"{text}; this server takes text only"
    return InvalidRequest(f"{where} = {_seen(body, steps)}: {_lower(text)}.", fix=fix, param=where)


def _unknown_field(name: str, steps: list[str], kind: type) -> InvalidRequest:
    param = _spell([*steps, name])
    if steps and steps[0] in REFUSED:
        return InvalidRequest(f"{steps[0]} is not supported here: {REFUSED[steps[0]]}.", fix="Leave it out.", param=steps[0])
    if name in TEXT_ONLY_PARTS and "content" in steps:
        return InvalidRequest(
            f"{param} is not supported: this server takes text only.", fix="Send parts of type text.", param=param
        )
    structs = [member for member in _walk(inspect.type_info(kind), steps) if isinstance(member, inspect.StructType)]
    known = [field.encode_name for struct in structs for field in struct.fields]
    near = difflib.get_close_matches(name, known, 1)
    useful = ", ".join(sorted(set(known) - set(REFUSED) - set(IGNORED)))
    fix = f"Did you mean {near[0]!r}?" if near else f"Known are: {useful}."
    return InvalidRequest(f"The field {param!r} is not known.", fix=fix, param=param)


def _walk(kind: inspect.Type, steps: list[str]) -> list[inspect.Type]:
    """The types that a path of the body may have."""
    if isinstance(kind, inspect.Metadata):
        return _walk(kind.type, steps)
    if isinstance(kind, inspect.UnionType):
        return [found for member in kind.types for found in _walk(member, steps)]
    if not steps:
        return [kind]
    if isinstance(kind, inspect.ListType):
        return _walk(kind.item_type, steps[1:])
    if isinstance(kind, inspect.StructType):
        return [found for field in kind.fields if field.encode_name == steps[0] for found in _walk(field.type, steps[1:])]
    return []


def _seen(body: bytes, steps: list[str]) -> str:
    """The value at a path of the body, short enough to print."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):  # broken behind what was decoded so far
        return "…"
    for step in steps:
        if isinstance(value, list) and step.isdigit():
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            break
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _spell(steps: list[str]) -> str:
    """`messages[0].content`."""
    return "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in steps).lstrip(".")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
