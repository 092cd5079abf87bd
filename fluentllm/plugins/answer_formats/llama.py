"""`llama3_json`: the whole answer is `{"name": …, "parameters": {…}}`, several with `;` between, perhaps behind a marker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import CallParser
from .grammar import either, json_tag, listed, node_of, structural_tag
from .reading import WAIT, expect, skip_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.protocols import CallRules, Tool, Where
    from fluentllm.core.types import GrammarSpec

TAG = "<|python_tag|>"


class Llama3Parser(CallParser):
    """An object is a call only if it names a function that there is, since any other JSON may be the answer."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(TAG, None, where="behind", separate_reasoning=False, calls=bool(tools))
        self._names = {tool.name for tool in tools}

    def _first(self) -> bool:
        at = skip_space(self._text, 0)
        behind = expect(self._text, at, TAG)
        if behind == WAIT and not self._final:
            return False
        self._lead = max(behind, at)
        self._state = self._object
        return True

    def _knows(self, name: str) -> bool:
        return name in self._names

    def _broken(self) -> bool:
        self._state = self._rest
        return True

    def _after(self) -> bool:
        at = skip_space(self._text, 0)
        if at == len(self._text) and not self._final:
            return False
        if self._text[at : at + 1] == ";":
            self._lead = at + 1
            self._state = self._object
        else:
            self._take(at)
            self._state = self._rest
        return True


class Llama3Json:
    """Implements `core.protocols.AnswerFormat`."""

    markers = frozenset({TAG})

    def __init__(self, template: str) -> None:
        pass

    def where(self, prompt_end: str) -> Where:
        return "behind"

    def parser(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> Llama3Parser:
        return Llama3Parser(tools)

    def grammar(self, tools: Sequence[Tool], rules: CallRules) -> GrammarSpec:
        tags = [json_tag("", tool, "", arguments="parameters") for tool in tools]
        calls = listed(tags, "; ", parallel=rules.parallel)
        if rules.otherwise is not None:
            calls = either(calls, node_of(rules.otherwise))
        elif not rules.required:  # whatever begins like a call must be one
            calls = either(calls, {"type": "regex", "pattern": r"[^{<\s][\s\S]*"})
        return structural_tag(calls, ())
