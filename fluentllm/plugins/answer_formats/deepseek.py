"""`deepseek_v3`: calls in a list of markers, with the arguments in a fence (V3, R1) or bare (V3.1).

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{…}\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import CallParser
from .grammar import schema_node, tag_grammar
from .parser import where_answers_begin
from .reading import BROKEN, WAIT, expect, expect_all, skip_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.protocols import CallRules, Tool, Where
    from fluentllm.core.types import GrammarSpec

    from .grammar import Node

ALL = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
ONE = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
BETWEEN = "<｜tool▁sep｜>"
THINK = ("<think>", "</think>")
FENCE = "```"


class DeepSeekParser(CallParser):
    def __init__(self, *, where: Where, separate_reasoning: bool, calls: bool) -> None:
        super().__init__(ALL[0], THINK, where=where, separate_reasoning=separate_reasoning, calls=calls)

    def _begin(self) -> bool:
        """At a call's own marker, the first's or a later one's."""
        start = skip_space(self._text, self._lead)
        begin = expect(self._text, start, ONE[0])
        if begin < 0:
            return self._unless_more(begin)
        first_end = self._word_end(begin)
        behind = expect(self._text, first_end, BETWEEN)
        if behind < 0 or first_end == begin:
            return self._unless_more(behind if behind < 0 else BROKEN)
        at = skip_space(self._text, behind)
        if at == len(self._text):
            return self._unless_more(WAIT)
        if self._text[at] == "{":
            name = self._text[begin:first_end]
        else:
            end = self._word_end(at)
            name = self._text[at:end]
            behind = expect_all(self._text, end, (f"{FENCE}json", "{"))
            if behind < 0 or not name:
                return self._unless_more(behind if behind < 0 and name else BROKEN)
            at = behind - 1
        self._start(name, at)
        self._state = self._arguments
        return True

    def _word_end(self, at: int) -> int:
        while at < len(self._text) and not self._text[at].isspace() and self._text[at] not in "<{`":
            at += 1
        return at

    def _unless_more(self, at: int) -> bool:
        """`at`: `WAIT` or `BROKEN`."""
        return self._broken() if at == BROKEN or self._final else False

    def _tail(self) -> bool:
        self._give("end", "")
        self._state = self._fence
        return True

    def _fence(self) -> bool:
        if self._skip(FENCE) is None:
            return False
        self._state = self._after
        return True

    def _after(self) -> bool:
        if self._skip(ONE[1]) is None:
            return False
        self._state = self._more
        return True

    def _more(self) -> bool:
        """Another call, or the end of all."""
        at = skip_space(self._text, 0)
        behind = expect(self._text, at, ONE[0], ALL[1])
        if behind == WAIT and not self._final:
            return False
        if behind > 0 and self._text.startswith(ONE[0], at):
            self._lead = at
            self._state = self._begin
        else:
            self._take(max(behind, 0))
            self._state = self._between
        return True


class DeepSeekV3:
    """Implements `core.protocols.AnswerFormat`."""

    markers = frozenset({*ALL, *ONE, BETWEEN, *THINK})

    def __init__(self, template: str) -> None:
        self._reasons = any(marker in template for marker in THINK)
        self._fenced = f"{FENCE}json" in template

    def where(self, prompt_end: str) -> Where:
        return where_answers_begin(THINK, prompt_end)

    def parser(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> DeepSeekParser:
        return DeepSeekParser(where=where, separate_reasoning=separate_reasoning, calls=bool(tools))

    def grammar(self, tools: Sequence[Tool], rules: CallRules) -> GrammarSpec:
        return tag_grammar(
            [self._tag(tool) for tool in tools],
            rules,
            trigger=ALL[0],
            separator="\n" if self._fenced else "",
            markers=self.markers,
            reasoning=THINK if self._reasons else None,
            around=ALL,
        )

    def _tag(self, tool: Tool) -> Node:
        begin, end = f"{ONE[0]}{tool.name}{BETWEEN}", ONE[1]
        if self._fenced:
            begin, end = f"{ONE[0]}function{BETWEEN}{tool.name}\n{FENCE}json\n", f"\n{FENCE}{ONE[1]}"
        return {"type": "tag", "begin": begin, "content": schema_node(tool.parameters, strict=tool.strict), "end": end}
