"""Grammars of answers that call tools, as structural tags: texts that begin a call, and a JSON schema for what comes then.

`grammar_xgrammar` compiles them. Beside the library's own words a schema says here whether it must be kept to (`strict`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from fluentllm.core.types import GrammarSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluentllm.core.protocols import Tool, Where

    from .parser import Reasoning

Node = dict[str, Any]


def schema_node(schema: dict[str, Any], *, strict: bool) -> Node:
    return {"type": "json_schema", "json_schema": schema, "strict": strict}


def sequence(*elements: Node) -> Node:
    return {"type": "sequence", "elements": list(elements)} if elements else {"type": "const_string", "value": ""}


def json_tag(begin: str, tool: Tool, end: str, *, arguments: str = "arguments") -> Node:
    """A call as an object between two texts."""
    head = f'{begin}{{"name": {msgspec.json.encode(tool.name).decode()}, "{arguments}": '
    return {"type": "tag", "begin": head, "content": schema_node(tool.parameters, strict=tool.strict), "end": f"}}{end}"}


@dataclass(frozen=True, kw_only=True)
class Around:
    """What comes before all calls, and behind them."""

    begin: str
    end: str


@dataclass(frozen=True)
class TagGrammar:
    """Calls, each a tag. `trigger`: what every call begins with, in text that is otherwise free."""

    trigger: str
    tags: list[Node]
    separator: str
    required: bool
    parallel: bool
    around: Around | None = None
    """Of all calls together, with `trigger` in its beginning and not in each call's."""

    def spec(self, reasoning: Reasoning | None, where: Where, markers: Iterable[str]) -> GrammarSpec:
        """`reasoning`: what may come first, where calls are required."""
        if self.required:
            return structural_tag(_after_reasoning(self._calls(), reasoning, where), markers)
        free: Node = {
            "type": "triggered_tags",
            "triggers": [self.trigger],
            "tags": self.tags if self.around is None else [self._calls()],
            "at_least_one": False,
            "stop_after_first": not self.parallel,
        }
        return structural_tag(free, markers)

    def _calls(self) -> Node:
        calls = listed(self.tags, self.separator, parallel=self.parallel)
        if self.around is None:
            return calls
        return {"type": "tag", "begin": self.around.begin, "content": calls, "end": self.around.end}


def listed(tags: list[Node], separator: str, *, parallel: bool) -> Node:
    """One of `tags`, or several if `parallel`."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def structural_tag(content: Node, markers: Iterable[str]) -> GrammarSpec:
    """`markers`: special tokens that the text may hold, where they are some."""
    source = {"type": "structural_tag", "format": content, "special_tokens": sorted(markers)}
    return GrammarSpec(kind="structural_tag", source=msgspec.json.encode(source).decode())


def _after_reasoning(calls: Node, reasoning: Reasoning | None, where: Where) -> Node:
    if reasoning is None or where == "behind":
        return calls
    begin, end = reasoning
    thought: Node = {
        "type": "tag",
        "begin": "" if where == "inside" else begin,
        "content": {"type": "any_text", "excludes": [end]},
        "end": [f"{end}\n\n", f"{end}\n", end],
    }
    return sequence(thought if where == "inside" else {"type": "optional", "content": thought}, calls)
