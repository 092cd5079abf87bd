"""Answers taken apart: every format by its name, and pieces joined, since how they are cut depends on how the text came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import AnswerFormat, Piece, Tool, Where

FORMATS = PluginManager.load({"frontend"}, allow=[]).registry("answer_formats")
NAMES = FORMATS.names()
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "zip": {"enum": ["007", "008"]}},
        "required": ["city"],
    },
)
TIME = Tool(name="time", parameters={"type": "object", "properties": {}})
TOOLS = (WEATHER, TIME)


def format_of(name: str, template: str = "") -> AnswerFormat:
    made: AnswerFormat = FORMATS.get(name).factory(template)
    return made


def read(
    name: str,
    chunks: Iterable[str],
    *,
    tools: Sequence[Tool] = TOOLS,
    where: Where = "before",
    separate: bool = True,
) -> list[Piece]:
    """The pieces of an answer, neighbours of one kind joined. A call's end stands alone."""
    parser = format_of(name).parser(tools, where=where, separate_reasoning=separate)
    pieces: list[Piece] = []
    for chunk in chunks:
        pieces += parser.feed(chunk)
    pieces += parser.flush()
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].kind == piece.kind and piece.kind not in ("call", "end"):
            joined[-1] = Piece(piece.kind, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def call(name: str, arguments: str) -> list[Any]:
    """The pieces of a whole call."""
    return [("call", name), ("arguments", arguments), ("end", "")]
