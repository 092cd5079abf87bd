"""How the programs of this folder are told shapes: one way of writing them, and errors that say what to type instead.

    --shape rows=2048,depth=6144 rows=4096,depth=4096,gated

A shape is a frozen dataclass. Its fields are what may be written, and those without a default must be. A field of type bool is
its name alone; whole numbers are at least 1, or 0 where that is their default.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterable, Sequence

S = TypeVar("S")


def add_shape(parser: ArgumentParser, kind: type[Any], what: str) -> None:
    """`--shape`, as often as wanted, several at a time; the shapes are in `options.shape`. what: says a plural."""
    parser.add_argument("--shape", type=lambda text: shape_of(text, kind), nargs="+", action="extend", default=[],
                        metavar="SHAPE", help=f"{what}, each written {spelling(kind)}")  # fmt: skip


def named(given: Sequence[str] | None, shapes: Sequence[object], every: Iterable[str]) -> list[str]:
    """Those that were named; without names all, or none where there are shapes."""
    return list(given) if given is not None else [] if shapes else list(every)


def shape_of(text: str, kind: type[S]) -> S:
    """Raises ArgumentTypeError, whose words argparse prints."""
    types, given = get_type_hints(kind), dict[str, Any]()
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in types:
            raise _wrong(text, kind, f"has {name!r}, which is none of {', '.join(types)}")
        if name in given:
            raise _wrong(text, kind, f"has {name} twice")
        if (types[name] is bool) == bool(equals):
            raise _wrong(text, kind, f"needs {name} {'alone, without a value' if equals else 'with a value'}")
        given[name] = True if types[name] is bool else value
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]  # type: ignore[arg-type]
    if missing:
        raise _wrong(text, kind, f"lacks {', '.join(missing)}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in given and types[field.name] in (int, float):
            least = 0 if field.default == 0 else 1
            number = _number(given[field.name], types[field.name], least)
            if number is None:
                sort = f"a whole number of at least {least}" if types[field.name] is int else "a number above 0"
                raise _wrong(text, kind, f"needs {field.name} to be {sort}, not {given[field.name]!r}")
            given[field.name] = number
    try:
        return kind(**given)
    except ValueError as error:  # what the shape itself refuses
        raise ArgumentTypeError(f"shape {text!r}: {error}") from None


def spelling(kind: type[Any]) -> str:
    """Such as `rows=N,depth=N[,gated]`."""
    types, parts = get_type_hints(kind), list[str]()
    for field in fields(kind):
        value = "" if types[field.name] is bool else "=TEXT" if types[field.name] is str else "=N"
        comma = "," if parts else ""
        parts.append(f"{comma}{field.name}{value}" if field.default is MISSING else f"[{comma}{field.name}{value}]")
    return "".join(parts)


def numbers(text: str) -> list[int]:
    """`1,8,32` → [1, 8, 32]."""
    return _numbers(text, 1)


def numbers_from_0(text: str) -> list[int]:
    return _numbers(text, 0)


def names(every: Iterable[str]) -> Callable[[str], list[str]]:
    """`a,b` → ["a", "b"], all of them known."""
    known = list(every)

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise ArgumentTypeError(f"there is no {name!r}: {','.join(known)}")
        return found

    return parse


def _numbers(text: str, least: int) -> list[int]:
    found = [_number(part, int, least) for part in text.split(",")]
    if None in found:
        raise ArgumentTypeError(f"{text!r} is no list of whole numbers of at least {least}, such as {least},8,32")
    return [int(number) for number in found if number is not None]


def _number(text: str, sort: type[int] | type[float], least: int) -> int | float | None:
    try:
        number = sort(text)
    except ValueError:
        return None
    ok = number >= least if sort is int else 0 < number < math.inf
    return number if ok else None


def _wrong(text: str, kind: type[Any], what: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"shape {text!r} {what}; write {spelling(kind)}")
