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
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"The JSON schema is not valid JSON: {error}.", fix="Correct it.", param="grammar") from None
    # Written anew, so that however it was spelt it is compiled once.
    return GrammarSpec(kind="json_schema", source=msgspec.json.encode(schema).decode())


def regex(pattern: str) -> GrammarSpec:
    """All of the text matches; no lookaheads, backreferences or word borders."""
    return GrammarSpec(kind="regex", source=pattern)


def choice(choices: Sequence[str]) -> GrammarSpec:
    """One of these."""
    return GrammarSpec(kind="choice", source=msgspec.json.encode(list(choices)).decode())


def grammar(text: str) -> GrammarSpec:
    """Rules as llama.cpp's GBNF has them, the first one called `root`: `root ::= "yes" | "no" [!.]?`."""
    return GrammarSpec(kind="grammar", source=text)
