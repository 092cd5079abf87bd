"""Structured outputs: OpenAI's `response_format`, and the names that vLLM and SGLang gave the rest → one grammar.

What is wrong with a grammar is told by the engine, as an error of the field `grammar`; who asked by another name is told that
name.
"""

from __future__ import annotations

from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct

from fluentllm.core.errors import FluentError, InvalidRequest
from fluentllm.frontend import structured

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from fluentllm.core.types import GrammarSpec

    from .schema import GenerationRequest

T = TypeVar("T")

JsonSchema = Annotated[dict[str, Any] | str | bool, Meta(description="A JSON schema, or its text.")]
Choices = Annotated[list[str], Meta(min_length=1)]


class NamedSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    """`response_format.json_schema`."""

    schema: JsonSchema
    name: Annotated[str, Meta(description="Not told to the model.")] | None = None
    description: Annotated[str, Meta(description="Not told to the model.")] | None = None
    strict: Annotated[bool, Meta(description="The schema is kept to whatever this is.")] | None = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    format: Annotated[dict[str, Any], Meta(description="Of a structural_tag, as xgrammar has it.")] | None = None


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """One of these."""

    json: JsonSchema | None = None
    regex: Annotated[str, Meta(description="The whole answer matches.")] | None = None
    choice: Annotated[Choices, Meta(description="The answer is one of these.")] | None = None
    grammar: Annotated[str, Meta(description="Rules as llama.cpp's GBNF has them, one of them called root.")] | None = None
    json_object: Annotated[bool, Meta(description="Any JSON object.")] | None = None
    structural_tag: Annotated[dict[str, Any] | str, Meta(description="As xgrammar has it, or its text.")] | None = None


_MAKERS: dict[str, Callable[[Any], GrammarSpec]] = {
    "structured_outputs.json": structured.json_schema,
    "structured_outputs.regex": structured.regex,
    "structured_outputs.choice": structured.choice,
    "structured_outputs.grammar": structured.grammar,
    "structured_outputs.structural_tag": structured.structural_tag,
    "guided_json": structured.json_schema,
    "guided_regex": structured.regex,
    "guided_choice": structured.choice,
    "guided_grammar": structured.grammar,
    "json_schema": structured.json_schema,
    "regex": structured.regex,
    "ebnf": structured.grammar,
}
"""Path of a field → what makes a grammar of its value."""


def take_grammar(body: GenerationRequest) -> str:
    """Put what the body asks for into its `grammar` → the field that asks. Raises `InvalidRequest` for two at once, and for a
    schema that is no JSON."""
    asked: list[tuple[str, GrammarSpec]] = [] if body.grammar is None else [("grammar", body.grammar)]
    asked += _response_format(body.response_format)
    wanted = body.structured_outputs
    if wanted is not None and wanted.json_object:
        asked.append(("structured_outputs.json_object", structured.json_object()))
    for path, make in _MAKERS.items():
        group, _, name = path.rpartition(".")
        value = getattr(getattr(body, group) if group else body, name, None)
        if value is not None:
            with naming(path):
                asked.append((path, make(value)))
    if len(asked) > 1:
        raise InvalidRequest(
            f"{' and '.join(path for path, _ in asked)} each say what the text must be.",
            fix="Give one of them.",
            param=asked[1][0],
        )
    if wanted is not None and not any(path.startswith("structured_outputs") for path, _ in asked):
        raise InvalidRequest(
            "structured_outputs does not say what the text must be.",
            fix="Give json, regex, choice, grammar, json_object or structural_tag in it, or leave it out.",
            param="structured_outputs",
        )
    if not asked:
        return "grammar"
    path, body.grammar = asked[0]
    return path


def _response_format(wanted: ResponseFormat | None) -> list[tuple[str, GrammarSpec]]:
    if wanted is None:
        return []
    for name in ("json_schema", "format"):
        needs = "structural_tag" if name == "format" else name
        given = getattr(wanted, name) is not None
        if given != (wanted.type == needs):
            example = f'Add "{name}": {{…}}.' if name == "format" else 'Add "json_schema": {"name": …, "schema": …}.'
            raise InvalidRequest(
                f"response_format has the type {wanted.type!r} {'and' if given else 'without'} a {name}.",
                fix="Leave one of them out." if given else example,
                param=f"response_format.{name}",
            )
    if wanted.json_schema is not None:
        with naming("response_format.json_schema.schema"):
            return [("response_format.json_schema.schema", structured.json_schema(wanted.json_schema.schema))]
    if wanted.format is not None:
        tag = {"type": "structural_tag", "format": wanted.format}
        return [("response_format.format", structured.structural_tag(tag))]
    return [("response_format", structured.json_object())] if wanted.type == "json_object" else []


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Errors of the grammar are those of `field`."""
    try:
        yield
    except FluentError as error:
        if error.param == "grammar":
            error.param = field
        raise


async def named(items: AsyncGenerator[T, None], field: str) -> AsyncGenerator[T, None]:
    """The same for what a stream raises."""
    with naming(field):
        async with aclosing(items):
            async for item in items:
                yield item
