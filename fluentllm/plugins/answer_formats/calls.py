"""Calls that are JSON objects behind a marker: arguments are given while they are written, whatever is broken as content."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from .parser import Parser
from .reading import BROKEN, WAIT, ObjectEnd, expect, read_head, skip_space, whole_call

if TYPE_CHECKING:
    from fluentllm.core.protocols import Where

    from .parser import Reasoning


class CallParser(Parser):
    """Until a call's name and the beginning of its arguments are there, all that was written for it stays in the text, so that
    it can still become content; `_lead` is how much of that comes before the object."""

    def __init__(
        self, marker: str, reasoning: Reasoning | None, *, where: Where, separate_reasoning: bool, calls: bool
    ) -> None:
        """`marker`: what comes before calls."""
        super().__init__(reasoning, where=where, separate_reasoning=separate_reasoning, calls=calls)
        self._marker = marker
        self._lead = 0
        self._end = ObjectEnd()
        self._seen = 0

    def _first(self) -> bool:
        self._state = self._content
        return True

    def _content(self) -> bool:
        if not self._give_until("content", self._marker):
            return False
        self._lead = skip_space(self._text, 0) + len(self._marker)
        self._state = self._begin
        return True

    def _begin(self) -> bool:
        """Behind the marker. A format with more than one spelling looks here which it is."""
        self._state = self._object
        return True

    def _broken(self) -> bool:
        """No call after all."""
        self._give("content", self._take(max(self._lead, 1)))
        self._state = self._content
        return True

    # -------------------------------------------------------------------------------------------------------------- objects
    def _object(self) -> bool:
        name, at = read_head(self._text, self._lead)
        if at == BROKEN or (at == WAIT and self._final):
            return self._broken()
        if at == WAIT:
            return False
        if name is None:
            self._end, self._seen = ObjectEnd(), skip_space(self._text, self._lead)
            self._state = self._whole
        elif self._knows(name):
            self._start(name, at)
            self._state = self._arguments
        else:
            return self._broken()
        return True

    def _knows(self, name: str) -> bool:
        """Whether this can be a call at all."""
        return True

    def _start(self, name: str, at: int) -> None:
        """The call's arguments begin at `at`."""
        self._take(at)
        self._give("call", name)
        self._end = ObjectEnd()

    def _arguments(self) -> bool:
        end = self._end.find(self._text, 0)
        self._give("arguments", self._take(len(self._text) if end == WAIT else end))
        if end == WAIT:
            return False
        self._state = self._tail
        return True

    def _tail(self) -> bool:
        """Behind the arguments: the end of the object, or more that it says, which nobody asked for."""
        at = skip_space(self._text, 0)
        if at == len(self._text) and not self._final:
            return False
        if self._text[at : at + 1] == ",":
            end = ObjectEnd(depth=1).find(self._text, at)
            if end == WAIT and not self._final:
                return False
            self._take(max(end, 0))  # if it never closes, what was written is content
        elif self._text[at : at + 1] == "}":
            self._take(at + 1)
        self._give("end", "")
        self._state = self._after
        return True

    def _whole(self) -> bool:
        end = self._end.find(self._text, self._seen)
        self._seen = len(self._text)
        if end == WAIT:
            return self._broken() if self._final else False
        call = whole_call(self._text[self._lead : end])
        if call is None or not self._knows(call[0]):
            return self._broken()
        self._start(call[0], end)
        self._give("arguments", call[1])
        self._give("end", "")
        self._state = self._after
        return True

    # --------------------------------------------------------------------------------------------------------- behind a call
    @abstractmethod
    def _after(self) -> bool:
        """The format's own: behind a call's object."""

    def _skip(self, *options: str) -> bool | None:
        """Take one of these away if it comes next, white space aside. None while that cannot be told."""
        end = expect(self._text, skip_space(self._text, 0), *options)
        if end == WAIT and not self._final:
            return None
        self._take(max(end, 0))
        return end > 0

    def _between(self) -> bool:
        """Behind calls: white space is not content."""
        if self._drop_space():
            self._state = self._content
            return True
        return False
