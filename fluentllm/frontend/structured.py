"""What a text must be, as grammars of the kinds that the plugin `grammar_xgrammar` compiles.

    from fluentllm import LLM, SamplingOptions, structured
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    [answer] = LLM().generate("As JSON:", SamplingOptions(grammar=structured.json_schema(schema)))

The functions only write grammars down; what is wrong with one is told by the engine, which has the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ..core.errors import InvalidRequest
from ..core.types import GrammarSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def json_object() -> GrammarSpec:
    """Any JSON object."""
    return GrammarSpec(kind="json_object", source="")


def json_schema(schema: Mapping[str, Any] | str | bool) -> GrammarSpec:
    """JSON that a schema describes, its properties in the schema's order, and no others. `schema`: as an object, or its text.

    Raises `InvalidRequest` for a text that is no JSON.
    """
    return GrammarSpec(kind="json_schema", source=_written_anew(schema, "JSON schema"))


def regex(pattern: str) -> GrammarSpec:
    """All of the text matches; no lookaheads, backreferences or word borders."""
    return GrammarSpec(kind="regex", source=pattern)


def choice(choices: Sequence[str]) -> GrammarSpec:
    """One of these."""
    return GrammarSpec(kind="choice", source=msgspec.json.encode(list(choices)).decode())


def grammar(text: str) -> GrammarSpec:
    """Rules as llama.cpp's GBNF has them, the first one called `root`: `root ::= "yes" | "no" [!.]?`."""
    return GrammarSpec(kind="grammar", source=text)


def structural_tag(tag: Mapping[str, Any] | str) -> GrammarSpec:
    """Free text with parts in it that are not: xgrammar's structural tag, `{"type": "structural_tag", "format": {…}}`, as an
    object, or its text. Raises `InvalidRequest` for a text that is no JSON."""
    return GrammarSpec(kind="structural_tag", source=_written_anew(tag, "structural tag"))


def _written_anew(value: Any, noun: str) -> str:
    """JSON of an object or of its text, so that however it was spelt it is compiled once."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"The {noun} is not valid JSON: {error}.", fix="Correct it.", param="grammar") from None
    return msgspec.json.encode(value).decode()
