"""`longcat`: LongCat-Flash-Chat writes a call as a JSON object, Flash-Lite and -Thinking as a name with keys and values.

    <longcat_tool_call>get_weather
    <longcat_arg_key>city</longcat_arg_key>
    <longcat_arg_value>Paris</longcat_arg_value>
    </longcat_tool_call>

A value is text if the function's schema says that it is a string, else JSON, or text after all if it is none.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .grammar import json_tag, tag_grammar
from .key_values import key_value_tag, means_text
from .parser import where_answers_begin
from .reading import BROKEN, WAIT, expect, skip_space
from .tagged import TaggedParser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.protocols import CallRules, Tool, Where
    from fluentllm.core.types import GrammarSpec

OPEN, CLOSE = "<longcat_tool_call>", "</longcat_tool_call>"
KEY, VALUE = ("<longcat_arg_key>", "</longcat_arg_key>"), ("<longcat_arg_value>", "</longcat_arg_value>")
THINK = ("<longcat_think>", "</longcat_think>")


class LongCatParser(TaggedParser):
    """Reads both spellings. One of keys and values is given whole: until its end it can still be broken."""

    def __init__(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> None:
        super().__init__((OPEN, CLOSE), THINK, where=where, separate_reasoning=separate_reasoning, calls=bool(tools))
        self._parameters = {tool.name: tool.parameters for tool in tools}
        self._name = ""
        self._read = 0
        """Up to where keys and values have been read."""
        self._searched = 0
        """Up to where the end of a value is not: long ones come in many pieces."""
        self._values: list[tuple[str, str]] = []

    def _begin(self) -> bool:
        at = skip_space(self._text, self._lead)
        if at == len(self._text) and not self._final:
            return False
        self._state = self._object if self._text[at : at + 1] == "{" else self._named
        return True

    def _named(self) -> bool:
        at = skip_space(self._text, self._lead)
        end = at
        while end < len(self._text) and not self._text[end].isspace() and self._text[end] != "<":
            end += 1
        if end == len(self._text) and not self._final:
            return False
        if end in (at, len(self._text)):
            return self._broken()
        self._name, self._read, self._values = self._text[at:end], end, []
        self._searched = 0
        self._state = self._key_values
        return True

    def _key_values(self) -> bool:
        while True:
            at = skip_space(self._text, self._read)
            behind = expect(self._text, at, CLOSE, KEY[0])
            if behind > 0 and self._text.startswith(CLOSE, at):
                self._give_whole(behind)
                return True
            key, behind = self._until(behind, KEY[1])
            if behind > 0:
                behind = expect(self._text, skip_space(self._text, behind), VALUE[0])
            value, behind = self._until(behind, VALUE[1], self._searched)
            if behind < 0:
                self._searched = len(self._text)
                return self._broken() if behind == BROKEN or self._final else False
            self._values.append((key, value))
            self._read, self._searched = behind, 0

    def _until(self, at: int, marker: str, searched: int = 0) -> tuple[str, int]:
        """What stands from `at` to `marker`, and where it ends. `searched`: up to where it is known not to be."""
        if at < 0:
            return "", at
        end = self._text.find(marker, max(at, searched - len(marker)))
        return (self._text[at:end], end + len(marker)) if end >= 0 else ("", WAIT)

    def _give_whole(self, end: int) -> None:
        self._take(end)
        arguments = {key.strip(): self._value(key.strip(), value) for key, value in self._values}
        self._give("call", self._name)
        self._give("arguments", json.dumps(arguments, ensure_ascii=False))
        self._give("end", "")
        self._state = self._between

    def _value(self, key: str, value: str) -> Any:
        if means_text(self._parameters.get(self._name, {}), key):
            return value
        try:
            return json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class LongCat:
    """Implements `core.protocols.AnswerFormat`."""

    markers = frozenset({OPEN, CLOSE, *KEY, *VALUE, *THINK})

    def __init__(self, template: str) -> None:
        self._reasons = any(marker in template for marker in THINK)
        self._keys = KEY[0] in template

    def where(self, prompt_end: str) -> Where:
        return where_answers_begin(THINK, prompt_end)

    def parser(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> LongCatParser:
        return LongCatParser(tools, where=where, separate_reasoning=separate_reasoning)

    def grammar(self, tools: Sequence[Tool], rules: CallRules) -> GrammarSpec:
        if self._keys:
            tags = [key_value_tag(tool, (OPEN, CLOSE), KEY, VALUE) for tool in tools]
        else:
            tags = [json_tag(OPEN, tool, CLOSE) for tool in tools]
        reasoning = THINK if self._reasons else None
        return tag_grammar(tags, rules, trigger=OPEN, separator="\n", markers=self.markers, reasoning=reasoning)
