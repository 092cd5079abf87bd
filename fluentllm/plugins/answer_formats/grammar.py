"""Grammars of answers that call tools, as structural tags: texts that begin a call, and a JSON schema for what comes then.

`grammar_xgrammar` compiles them. Beside the library's own words a schema says here whether it must be kept to (`strict`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from fluentllm.core.errors import InvalidRequest
from fluentllm.core.types import GrammarSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluentllm.core.protocols import CallRules, Tool, Where

    from .parser import Reasoning

Node = dict[str, Any]


def schema_node(schema: Any, *, strict: bool) -> Node:
    return {"type": "json_schema", "json_schema": schema, "strict": strict}


def sequence(*elements: Node) -> Node:
    return {"type": "sequence", "elements": list(elements)} if elements else {"type": "const_string", "value": ""}


def json_tag(begin: str, tool: Tool, end: str, *, arguments: str = "arguments") -> Node:
    """A call as an object between two texts."""
    head = f'{begin}{{"name": {msgspec.json.encode(tool.name).decode()}, "{arguments}": '
    return {"type": "tag", "begin": head, "content": schema_node(tool.parameters, strict=tool.strict), "end": f"}}{end}"}


def tag_grammar(
    tags: list[Node],
    rules: CallRules,
    *,
    trigger: str,
    separator: str,
    markers: Iterable[str],
    reasoning: Reasoning | None = None,
    around: tuple[str, str] | None = None,
) -> GrammarSpec:
    """Of calls that are `tags` and begin with `trigger`; `around` stands before and behind all of them, and begins so instead.
    `reasoning` may come first."""
    calls = listed(tags, separator, parallel=rules.parallel)
    if around is not None:
        calls = {"type": "tag", "begin": around[0], "content": calls, "end": around[1]}
    if rules.otherwise is not None:
        calls = either(calls, node_of(rules.otherwise))
    elif not rules.required:
        free: Node = {
            "type": "triggered_tags",
            "triggers": [trigger],
            "tags": tags if around is None else [calls],
            "at_least_one": False,
            "stop_after_first": not rules.parallel,
        }
        return structural_tag(free, markers)
    return structural_tag(_after_reasoning(calls, reasoning, rules.where), markers)


def either(*elements: Node) -> Node:
    return {"type": "or", "elements": list(elements)}


def node_of(grammar: GrammarSpec) -> Node:
    """A grammar of another kind as a part of a structural tag. Raises `InvalidRequest` for a kind that cannot be one."""
    kind, source = grammar.kind, grammar.source
    try:
        if kind == "json_object":
            return schema_node({"type": "object"}, strict=True)
        if kind == "json_schema":
            return schema_node(msgspec.json.decode(source), strict=True)
        if kind == "choice":
            return either(*({"type": "const_string", "value": text} for text in msgspec.json.decode(source, type=list[str])))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The grammar's source is not valid: {error}.", fix="Correct it.", param="grammar") from None
    if kind == "regex":
        return {"type": "regex", "pattern": source}
    if kind == "grammar":
        return {"type": "grammar", "grammar": source}
    raise InvalidRequest(
        f"A grammar of the kind {kind!r} leaves no room for calls of tools.",
        fix='Leave one of them out, or set tool_choice to "none".',
        param="grammar",
    )


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
