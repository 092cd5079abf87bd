"""Random schemas: each is refused, or every text that its masks lead to is valid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from fluentllm import structured
from fluentllm.core.errors import InvalidRequest

from .conftest import context, needs_xgrammar

if TYPE_CHECKING:
    from fluentllm.core.types import GrammarSpec
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

pytestmark = needs_xgrammar
END = 256
BYTES = END + 1
LONGEST = 300
OWN = {
    "string": ("minLength", "maxLength", "pattern", "format", "title"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "boolean": ("default",),
    "null": ("title",),
    "array": ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"),
    "object": (
        "properties", "required", "additionalProperties", "minProperties", "maxProperties", "propertyNames",
        "patternProperties", "unevaluatedProperties",
    ),
}  # fmt: skip
OTHERS = ("enum", "const", "anyOf", "allOf", "$ref", "not", "if", "multipleOf", "uniqueItems", "contains", "dependentRequired")
ODD = (0, -2, 2.5, "", "a", None, True, [], {}, ["a"], {"a": 1})


def schema(rng: random.Random, depth: int, odd: float) -> Any:
    """Mostly of sensible keywords for its type; sometimes of any. `odd`: share of values that are nonsense."""
    if not depth:
        return rng.choice([{"type": "integer"}, {"type": "string", "maxLength": 3}, {}, True, {"type": "null"}])
    kind = rng.choice(list(OWN))
    words = rng.sample(OWN[kind], min(len(OWN[kind]), rng.randint(0, 3)))
    if rng.random() < 0.3:
        words.append(rng.choice([*OTHERS, *(word for own in OWN.values() for word in own)]))
    made = {"type": kind} if rng.random() < 0.75 else {}
    for word in words:
        made[word] = rng.choice(ODD) if rng.random() < odd else value(rng, word, depth)
    return made


def value(rng: random.Random, word: str, depth: int) -> Any:
    def below() -> Any:
        return schema(rng, depth - 1, 0)

    if word in ("properties", "patternProperties"):
        names = "abc" if word == "properties" else ("^a+$", "b", "^[cd]")
        return {name: below() for name in rng.sample(names, 2)}
    if word in ("anyOf", "allOf", "prefixItems"):
        return [below() for _ in range(rng.randint(1, 2))]
    if word.startswith("min") or word == "exclusiveMinimum":
        return rng.randint(0, 2)
    if word.startswith("max") or word == "exclusiveMaximum":
        return rng.randint(1, 9)
    fixed = {
        "required": ["a"], "enum": [1, "a", None, [1]], "const": {"a": 1}, "$ref": "#/$defs/x", "multipleOf": 2, "title": "t",
        "uniqueItems": True, "dependentRequired": {"a": ["b"]}, "default": 1, "format": "date",
        "pattern": rng.choice(["^a+$", "b", "^[a-c]{2}$", "^a|b$"]), "propertyNames": {"pattern": "^a+$"},
    }  # fmt: skip
    return fixed[word] if word in fixed else rng.choice([True, False, below(), below()])


def texts(library: Library, spec: GrammarSpec, rng: random.Random) -> list[str]:
    """Random walks along the masks, which prefer to close what is open; those that come to an end."""
    from fluentllm.plugins.grammar_xgrammar.compiler import Compiler

    grammar, found = Compiler(spec.kind, library).compile(spec.source), []
    for _ in range(3):
        matcher, text = grammar.matcher(), bytearray()
        while len(text) < LONGEST:
            mask = memoryview(bytearray(4 * -(-BYTES // 32))).cast("i")
            matcher.fill(mask)
            allowed = [token for token in range(BYTES) if mask[token // 32] >> token % 32 & 1]
            assert allowed, (text, spec.source)
            if END in allowed:
                found.append(text.decode())
                break
            plain = [token for token in allowed if chr(token).isascii() and chr(token).isprintable()]
            closing = [token for token in plain if chr(token) in '"}]']
            text.append(rng.choice(closing if closing and rng.random() < 0.5 else plain or allowed))
            assert matcher.accept(text[-1])
    return found


@pytest.mark.parametrize(("seed", "odd"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_what_is_taken_is_kept_to(tmp_path: Path, seed: int, odd: float) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

    (tmp_path / "config.json").write_text("{}")
    library = Library(context(tmp_path, BYTES, (END,), **{"model.load_format": "dummy"}), 1)
    rng, valid, refused = random.Random(seed), 0, 0
    for _ in range(400):
        made = {"anyOf": [schema(rng, 3, odd), schema(rng, 2, odd)], "$defs": {"x": schema(rng, 1, 0)}}
        try:
            found = texts(library, structured.json_schema(made), rng)
        except InvalidRequest:
            refused += 1
            continue
        try:
            checks = jsonschema.Draft202012Validator(made)
            checks.check_schema(made)
        except jsonschema.SchemaError:
            continue  # more than the standard allows was understood
        for text in found:
            assert checks.is_valid(json.loads(text)), (text, made)
        valid += len(found)
    assert valid > 250
    assert refused > 50
