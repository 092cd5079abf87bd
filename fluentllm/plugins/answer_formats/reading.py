"""Reading the beginning of a text that is still being written: what is there, what cannot be, and what may still come."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

WAIT: Final = -1
"""The text ends before it can be told."""
BROKEN: Final = -2
"""It is something else, whatever follows."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


def skip_space(text: str, at: int) -> int:
    """Where the next character stands that is no white space, or the text's length."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def expect(text: str, at: int, *options: str) -> int:
    """Behind the one of `options` that stands at `at`, or `WAIT` or `BROKEN`. None may begin another."""
    for option in options:
        there = text[at : at + len(option)]
        if there == option:
            return at + len(option)
        if option.startswith(there) and at + len(there) == len(text):
            return WAIT
    return BROKEN


def expect_all(text: str, at: int, parts: Sequence[str]) -> int:
    """The same for parts in a row, with white space before each."""
    for part in parts:
        at = expect(text, skip_space(text, at), part)
        if at < 0:
            return at
    return at


def could_begin(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` starts with; less than the marker's own."""
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0 and not marker.startswith(text[at:]):
        at = text.find(marker[0], at + 1)
    return len(text) - at if at >= 0 else 0


class Head(NamedTuple):
    """Of a call as an object: `{"name": NAME, "arguments": {`."""

    name: str | None
    """None if it must be read whole: its parts come in another order, or are of other kinds."""
    at: int
    """Where the arguments begin; `WAIT`, or `BROKEN` for what is no object."""


def read_head(text: str, at: int) -> Head:
    """What begins at `at`, white space aside."""
    name = ""
    for number, options in enumerate(_HEAD):
        at = skip_space(text, at)
        if options:
            end = expect(text, at, *options)
            if end == BROKEN:
                return Head(None, 0 if number else BROKEN)
        elif at == len(text):
            end = WAIT
        else:
            found = _STRING.match(text, at)
            if found is None:
                return Head(None, WAIT if text[at] == '"' else 0)
            try:
                name = json.loads(found[0])
            except ValueError:
                return Head(None, 0)
            end = found.end()
        if end == WAIT:
            return Head(None, WAIT)
        at = end
    return Head(name, at - 1) if name else Head(None, 0)


_HEAD: tuple[tuple[str, ...], ...] = (
    ("{",), ('"name"',), (":",), (), (",",), ('"arguments"', '"parameters"'), (":",), ("{",),
)  # fmt: skip
"""The empty one stands for a string."""


class ObjectEnd:
    """Finds where a JSON object (or list) ends, whose text comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        """`depth`: brackets that are open already."""
        self._depth = depth
        self._string = False
        self._escaped = False

    def find(self, text: str, at: int) -> int:
        """Behind the bracket that closes it, or `WAIT`: then the next call goes on behind this `text`."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._string else _OUTSIDE).search(text, at)
            if found is None:
                return WAIT
            char, at = found[0], found.end()
            if char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = not self._string
            else:
                self._depth += 1 if char in "{[" else -1
                if self._depth <= 0:
                    return at
        return WAIT


def whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (a JSON object, as text) of a call that is an object, or None if it is no call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = _object(arguments)
    elif arguments is None:
        arguments = {}
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
