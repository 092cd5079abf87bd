"""What xgrammar keeps to of JSON Schema. It reads other keywords over, so they are refused here by their place.

Only keywords that could make a text invalid count: titles, examples and unknown words may be anywhere, and keywords for other
types than a schema's own say nothing. Where the library allows less than the schema does, such as properties in another order
than the schema's, its answers are valid all the same. Tried on xgrammar 0.2.5 and 0.2.9; `tests/structured` tries each again.
"""

from __future__ import annotations

import re
from typing import Any

from ...core.errors import InvalidRequest

MAX_DEPTH = 64
"""Schemas inside each other. The time that the library takes grows with its cube: 0.05 s for 100, 6 s for 500."""
MAX_REFERENCES = 500
"""Different ones."""

OBJECTS = {
    "properties", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties", "required",
    "minProperties", "maxProperties", "dependentSchemas", "dependentRequired", "dependencies",
}  # fmt: skip
ARRAYS = {
    "prefixItems", "items", "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains", "minItems",
    "maxItems", "uniqueItems",
}  # fmt: skip
NUMBERS = {"multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"}
STRINGS = {"maxLength", "minLength", "pattern", "format"}
KEYWORDS = {"object": OBJECTS, "array": ARRAYS, "number": NUMBERS, "integer": NUMBERS, "string": STRINGS}
FREE = {"additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties"}
"""By which an object may have properties that are not declared."""
WHOLE = {"$ref", "enum", "const", "anyOf", "oneOf", "allOf"}
"""Each says all that a schema says."""
NEVER = {
    "$dynamicRef", "$recursiveRef", "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies",
    "additionalItems", "contains", "minContains", "maxContains", "uniqueItems", "multipleOf",
}  # fmt: skip
ASSERTIONS = {"type", *OBJECTS, *ARRAYS, *NUMBERS, *STRINGS, *WHOLE, *NEVER}
_ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
"""An escape, or a set of characters."""
_GROUP = re.compile(r"\(\?(?!:)")
"""A lookahead or another group that is more than a group."""


def check_schema(schema: Any) -> None:
    """Raises `InvalidRequest` for what would be read over, or takes too long."""
    _Check(schema).run()


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._pointers = ["#"]
        """That references point to, in the order in which they were found."""

    def run(self) -> None:
        for pointer in self._pointers:  # which grows
            self.visit(self._target(pointer), pointer.removeprefix("#").lstrip("/"), 0)

    def visit(self, schema: Any, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidRequest(
                f"The JSON schema has more than {MAX_DEPTH} schemas inside each other.", fix="Flatten it.", param="grammar"
            )
        if not isinstance(schema, dict):
            return  # true, or something that the library refuses itself
        found = {name for name in schema if name in ASSERTIONS and not (name == "uniqueItems" and schema[name] is False)}
        whole = sorted(found & WHOLE)
        if whole:
            self._whole(schema, whole[0], found, path)
        else:
            found = self._of_type(schema, found, path)
        if found & NEVER:
            raise _refused(path, min(found & NEVER), "it is not supported")
        self._inside(schema, found, path, depth)
        if "$ref" in found:
            self._follow(schema["$ref"], path)

    def _inside(self, schema: dict[str, Any], found: set[str], path: str, depth: int) -> None:
        if "propertyNames" in found and isinstance(schema["propertyNames"], dict):
            self.visit({"type": "string", **schema["propertyNames"]}, f"{path}.propertyNames", depth + 1)
        for name in ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"):
            if name in found:
                self.visit(schema[name], f"{path}.{name}", depth + 1)
        for name in ("properties", "patternProperties"):
            for key, value in _pairs(schema, name, found):
                self.visit(value, f"{path}.{name}.{key}", depth + 1)
        for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
            for number, value in enumerate(schema[name] if name in found and isinstance(schema[name], list) else ()):
                self.visit(value, f"{path}.{name}[{number}]", depth + 1)

    def _whole(self, schema: dict[str, Any], name: str, found: set[str], path: str) -> None:
        beside = found - {name} - ({"type"} if name in ("enum", "const") else set())
        if beside:
            raise _refused(path, min(beside), f"it is not supported beside {name}")
        if name == "allOf" and isinstance(schema[name], list) and len(schema[name]) > 1:
            raise _refused(path, name, "of several schemas it is not supported")
        if name in ("enum", "const") and "type" in found:
            values = schema[name] if name == "enum" else [schema[name]]
            types = _types(schema)
            for value in values if isinstance(values, list) else ():
                if not any(_is(value, kind) for kind in types):
                    raise _refused(path, name, f"{value!r} is not of the type beside it")

    def _of_type(self, schema: dict[str, Any], found: set[str], path: str) -> set[str]:
        """`found` less what says nothing about values of the schema's types."""
        types = _types(schema)
        if not types:
            types = [kind for kind, signs in _SIGNS.items() if found & signs]
            loose = found - {"type"} - NEVER
            if not types:
                if loose:
                    raise _refused(path, min(loose), "it is not supported without a type")
                return found
        found &= {"type"}.union(NEVER - OBJECTS - ARRAYS - NUMBERS, *(KEYWORDS.get(kind, set()) for kind in types))
        if "object" in types:
            self._object(schema, found, path)
        if "string" in types:
            self._string(schema, found, path)
        return found

    def _object(self, schema: dict[str, Any], found: set[str], path: str) -> None:
        declared = {key for key, _ in _pairs(schema, "properties", found)}
        required = schema["required"] if "required" in found and isinstance(schema["required"], list) else []
        for key in required:
            if key not in declared:
                raise _refused(path, "required", f"{key!r} is not among the properties")
        free = {name for name in found & FREE if schema[name] is not False}
        least = schema.get("minProperties", 0)
        if free and isinstance(least, int) and least > max(1, len(required)):
            raise _refused(
                path, "minProperties", "above 1 it is not supported where names are free: one that repeats counts twice"
            )
        if "propertyNames" in found:
            names = schema["propertyNames"]
            if not isinstance(names, dict) or not names.keys() & (STRINGS | WHOLE):
                raise _refused(path, "propertyNames", "it says nothing of the names")
            beside = (found & FREE) - {"propertyNames"} | ({"properties"} if declared else set())
            for name in sorted(beside):
                if schema[name] is not True:
                    raise _refused(path, "propertyNames", f"it is not supported beside {name}")
        if "patternProperties" in found and declared:
            raise _refused(path, "patternProperties", "it is not supported beside properties")
        for key, _ in _pairs(schema, "patternProperties", found):
            _check_pattern(key, path, "patternProperties")

    def _string(self, schema: dict[str, Any], found: set[str], path: str) -> None:
        groups = [group for group in ({"pattern"}, {"format"}, {"minLength", "maxLength"}) if found & group]
        if len(groups) > 1:
            raise _refused(path, min(found & groups[1]), f"it is not supported beside {min(found & groups[0])}")
        if "pattern" in found:
            _check_pattern(schema["pattern"], path, "pattern")

    def _follow(self, pointer: Any, path: str) -> None:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise _refused(path, "$ref", "only references inside the schema, such as #/$defs/item, are supported")
        if pointer not in self._pointers:
            self._pointers.append(pointer)
        if len(self._pointers) > MAX_REFERENCES:
            raise InvalidRequest(
                f"The JSON schema refers to more than {MAX_REFERENCES} places.", fix="Use fewer definitions.", param="grammar"
            )

    def _target(self, pointer: str) -> Any:
        """What it points to; None, which the library refuses, where there is nothing."""
        target = self._root
        for step in pointer.split("/")[1:]:
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        return target


_SIGNS = {
    "object": {"properties", "additionalProperties", "unevaluatedProperties"},
    "array": {"prefixItems", "items", "unevaluatedItems"},
}
"""By what the library knows a schema's type where it is not stated."""


def _types(schema: dict[str, Any]) -> list[str]:
    stated = schema.get("type", [])
    if isinstance(stated, list):
        return [kind for kind in stated if isinstance(kind, str)]
    return [stated] if isinstance(stated, str) else []


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    python: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict}
    return isinstance(value, python.get(kind, ()))


def _pairs(schema: dict[str, Any], name: str, found: set[str]) -> list[tuple[str, Any]]:
    return list(schema[name].items()) if name in found and isinstance(schema[name], dict) else []


def _check_pattern(pattern: Any, path: str, name: str) -> None:
    if not isinstance(pattern, str):
        return
    bare = _ESCAPED.sub("", pattern)  # of what stands for itself
    if _GROUP.search(bare):
        raise _refused(path, name, f"{pattern!r} has a group that is more than a group, such as a lookahead")
    inside = bare.removeprefix("^").removesuffix("$")
    if "^" in inside or "$" in inside or (inside != bare and _top_level_choice(inside)):
        raise _refused(path, name, f"{pattern!r} has an anchor for a part of it; put the whole into ^(?:…)$")


def _top_level_choice(pattern: str) -> bool:
    depth = 0
    for char in pattern:
        depth += (char == "(") - (char == ")")
        if char == "|" and not depth:
            return True
    return False


def _refused(path: str, name: str, why: str) -> InvalidRequest:
    where = f"{path}.{name}".removeprefix(".")
    return InvalidRequest(
        f"The JSON schema cannot be used: {where}: {why}.",
        fix="Leave it out, and check it in what you receive.",
        param="grammar",
    )
