"""`hermes`: each call a JSON object between two tags, as Hermes, Qwen 2.5 and Qwen 3 write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import CallParser
from .grammar import json_tag, tag_grammar
from .parser import where_answers_begin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.protocols import CallRules, Tool, Where
    from fluentllm.core.types import GrammarSpec

    from .parser import Reasoning

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK = ("<think>", "</think>")


class TaggedParser(CallParser):
    def __init__(
        self, tags: tuple[str, str], reasoning: Reasoning | None, *, where: Where, separate_reasoning: bool, calls: bool
    ) -> None:
        super().__init__(tags[0], reasoning, where=where, separate_reasoning=separate_reasoning, calls=calls)
        self._closing = tags[1]

    def _after(self) -> bool:
        if self._skip(self._closing) is None:
            return False
        self._state = self._between
        return True


class Hermes:
    """Implements `core.protocols.AnswerFormat`."""

    markers = frozenset({OPEN, CLOSE, *THINK})

    def __init__(self, template: str) -> None:
        self._reasons = any(marker in template for marker in THINK)

    def where(self, prompt_end: str) -> Where:
        return where_answers_begin(THINK, prompt_end)

    def parser(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> TaggedParser:
        return TaggedParser((OPEN, CLOSE), THINK, where=where, separate_reasoning=separate_reasoning, calls=bool(tools))

    def grammar(self, tools: Sequence[Tool], rules: CallRules) -> GrammarSpec:
        tags = [json_tag(f"{OPEN}\n", tool, f"\n{CLOSE}") for tool in tools]
        reasoning = THINK if self._reasons else None
        return tag_grammar(tags, rules, trigger=OPEN, separator="\n", markers=self.markers, reasoning=reasoning)
