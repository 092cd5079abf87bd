"""Formats of answers: how a model writes reasoning and calls of tools into its text, and what of that an API tells apart."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, Literal, NamedTuple, Protocol

from msgspec import Struct

from ..types import GrammarSpec

PieceKind = Literal["content", "reasoning", "call", "arguments", "end"]
Where = Literal["before", "inside", "behind"]
"""Where an answer begins: before any reasoning, inside it (the prompt opened it), or behind it (the prompt closed it)."""


class Piece(NamedTuple):
    """A part of an answer. A call is a `call`, any number of `arguments`, and an `end`, unless it was cut off."""

    kind: PieceKind
    text: str
    """Of a `call` the function's name, of an `end` nothing. All `arguments` of a call, joined, are what the model wrote for its
    JSON object."""


class Tool(Struct, frozen=True):
    """A function that an answer may call."""

    name: str
    parameters: dict[str, Any]
    """JSON schema of its arguments, an object's."""
    strict: bool = False
    """A grammar must keep to the schema, or be refused."""


class CallRules(Struct, frozen=True, kw_only=True):
    """What a grammar of an answer that may call tools must say beside the tools."""

    required: bool
    """One call at least, and nothing else but reasoning."""
    parallel: bool
    """More than one is allowed."""
    where: Where
    otherwise: GrammarSpec | None = None
    """What an answer must be that calls nothing; None: any text. Not where calls are required."""


class AnswerParser(Protocol):
    """Takes one answer apart while it is written. It holds back only what may still become a marker or a call; the pieces are
    the same however the text is cut, but for where they are cut themselves."""

    plain: bool
    """All that follows is content: nobody needs to feed it any more."""

    def feed(self, text: str) -> list[Piece]: ...

    def flush(self) -> list[Piece]:
        """At the end: what was held back."""


class AnswerFormat(Protocol):
    """Made by a factory that a plugin registers, of the source of the model's chat template."""

    markers: frozenset[str]
    """Texts that may be special tokens of the tokenizer, and must be part of the text all the same."""

    def where(self, prompt_end: str) -> Where:
        """Where the answer to a prompt begins that ends like this."""

    def parser(self, tools: SequenceOf[Tool], *, where: Where, separate_reasoning: bool) -> AnswerParser:
        """`tools`: calls of these are looked for; none if it is empty. Without `separate_reasoning` it is content."""

    def grammar(self, tools: SequenceOf[Tool], rules: CallRules) -> GrammarSpec:
        """Of answers that may call these tools. Raises `InvalidRequest` for what no grammar can say."""
