"""`mistral`: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or newer, `[TOOL_CALLS]NAME[ARGS]{…}` for each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import CallParser
from .grammar import json_tag, schema_node, tag_grammar
from .reading import BROKEN, WAIT, expect, skip_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.protocols import CallRules, Tool, Where
    from fluentllm.core.types import GrammarSpec

    from .grammar import Node

OPEN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"


class MistralParser(CallParser):
    def __init__(self, *, calls: bool) -> None:
        super().__init__(OPEN, None, where="behind", separate_reasoning=False, calls=calls)
        self._listed = False

    def _begin(self) -> bool:
        at = skip_space(self._text, self._lead)
        if at == len(self._text) and not self._final:
            return False
        self._listed = self._text[at : at + 1] == "["
        if self._listed:
            self._lead = at + 1
        self._state = self._object if self._listed else self._named
        return True

    def _named(self) -> bool:
        at = skip_space(self._text, self._lead)
        end = at
        while end < len(self._text) and (self._text[end].isalnum() or self._text[end] in "_-."):
            end += 1
        behind = expect(self._text, end, ARGUMENTS, "{")
        if behind > 0 and self._text[behind - 1] != "{":
            behind = expect(self._text, skip_space(self._text, behind), "{")
        if behind == BROKEN or end == at or (behind == WAIT and self._final):
            return self._broken()
        if behind == WAIT:
            return False
        self._start(self._text[at:end], behind - 1)
        self._state = self._arguments
        return True

    def _tail(self) -> bool:
        if self._listed:
            return super()._tail()
        self._give("end", "")
        self._state = self._between
        return True

    def _after(self) -> bool:
        at = skip_space(self._text, 0)
        if at == len(self._text) and not self._final:
            return False
        if self._text[at : at + 1] == ",":
            self._lead = at + 1
            self._state = self._object
        else:
            self._take(at + 1 if self._text[at : at + 1] == "]" else 0)
            self._state = self._between
        return True


class Mistral:
    """Implements `core.protocols.AnswerFormat`."""

    markers = frozenset({OPEN, ARGUMENTS})

    def __init__(self, template: str) -> None:
        self._names = ARGUMENTS in template
        self._list = f"{OPEN} [" if f"{OPEN} [" in template else f"{OPEN}["

    def where(self, prompt_end: str) -> Where:
        return "behind"

    def parser(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> MistralParser:
        return MistralParser(calls=bool(tools))

    def grammar(self, tools: Sequence[Tool], rules: CallRules) -> GrammarSpec:
        if self._names:
            tags = [_named(tool) for tool in tools]
            return tag_grammar(tags, rules, trigger=OPEN, separator="", markers=self.markers)
        tags = [json_tag("", tool, "") for tool in tools]
        return tag_grammar(tags, rules, trigger=OPEN, separator=", ", markers=self.markers, around=(self._list, "]"))


def _named(tool: Tool) -> Node:
    content = schema_node(tool.parameters, strict=tool.strict)
    return {"type": "tag", "begin": f"{OPEN}{tool.name}{ARGUMENTS}", "content": content, "end": ""}
