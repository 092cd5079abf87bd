"""Answers taken apart as the API shows them: content, reasoning, and calls of tools; whole, or as deltas of a stream."""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING

from msgspec import UNSET

from .answers import AnswerDelta, AnswerMessage, Call, CallDelta, CalledFunction, FunctionDelta

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.protocols import AnswerParser, Piece

    from .answers import ChatFinishReason, ChatLogprobs, FinishReason
    from .chunks import Splicer

PROMPT_END = 32
"""Tokens of a prompt that tell whether it begins the model's reasoning."""


class Reader:
    """One choice's pieces."""

    def __init__(self, parser: AnswerParser, *, parallel: bool, required: bool = False) -> None:
        """Unless `parallel`, calls behind the first are left out. `required`: the answer is calls and nothing else, so what is
        left of one that was cut before its name was there is no content either."""
        self.parser = parser
        self.required = required
        self.calls = 0
        """How many have begun."""
        self._most = None if parallel else 1
        self._left_out = False
        self._open = False
        """Has a call begun that has not ended?"""

    def read(self, text: str, *, final: bool) -> list[Piece]:
        pieces = self.parser.feed(text)
        if final:
            pieces += [piece for piece in self.parser.flush() if not (self.required and piece.kind == "content")]
        return [piece for piece in pieces if self._shown(piece)]

    def _shown(self, piece: Piece) -> bool:
        if piece.kind == "call":
            self._left_out = self._most is not None and self.calls >= self._most
            self.calls += not self._left_out
            self._open = True
        elif piece.kind == "end":
            self._open = False
        return not (self._left_out and piece.kind in ("call", "arguments", "end"))

    def reason(self, reason: FinishReason) -> ChatFinishReason:
        """A call that a stop string cut is none that could be made."""
        return "tool_calls" if self.calls and reason == "stop" and not self._open else reason


def message_of(text: str, reader: Reader) -> AnswerMessage:
    """A whole answer."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[Call] = []
    for piece in reader.read(text, final=True):
        if piece.kind == "content":
            content.append(piece.text)
        elif piece.kind == "reasoning":
            reasoning.append(piece.text)
        elif piece.kind == "call":
            calls.append(Call(id=_new_id(), function=CalledFunction(name=piece.text, arguments="")))
        elif piece.kind == "arguments":
            calls[-1].function.arguments += piece.text
    nothing = None if calls or reasoning or reader.required else ""
    return AnswerMessage(
        content="".join(content) or nothing,
        reasoning_content="".join(reasoning) or UNSET,
        tool_calls=calls or UNSET,
    )


class PartsWriter:
    """The events of a stream, all choices'."""

    def __init__(self, splicer: Splicer, start: Callable[[], Reader], choices: int) -> None:
        self._splicer = splicer
        self._readers = [start() for _ in range(choices)]
        self._logprobs: dict[int, ChatLogprobs] = {}
        """By choice: of text that is still held back."""

    def plain(self, index: int) -> bool:
        """Nothing but content comes any more, and nothing waits to be told with it."""
        reader = self._readers[index]
        return reader.parser.plain and not reader.calls and index not in self._logprobs

    def write(
        self, index: int, text: str, logprobs: ChatLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> bytes:
        """An event a piece. Log-probabilities come with the first that there is; the reason with the last."""
        reader = self._readers[index]
        calls = reader.calls
        events: list[Callable[[ChatLogprobs | None, ChatFinishReason | None], bytes]] = []
        for piece in reader.read(text, final=finish_reason is not None):
            calls += piece.kind == "call"
            if piece.kind == "content":
                events.append(partial(self._splicer.chunk, index, piece.text))
            elif piece.kind != "end":
                events.append(partial(self._splicer.delta, index, _delta(piece, calls - 1)))
        held = self._logprobs.pop(index, None)
        if held is not None and logprobs is not None:
            held.content += logprobs.content
        logprobs = held or logprobs
        if not events and finish_reason is None:
            if logprobs is not None:
                self._logprobs[index] = logprobs
            return b""
        if not events:
            delta = AnswerDelta() if reader.calls or reader.required else AnswerDelta(content="")
            events.append(partial(self._splicer.delta, index, delta))
        reason = None if finish_reason is None else reader.reason(finish_reason)
        last = len(events) - 1
        return b"".join(
            event(None if number else logprobs, reason if number == last else None) for number, event in enumerate(events)
        )


def _delta(piece: Piece, call: int) -> AnswerDelta:
    """Of anything but content. `call`: number of the call that the piece belongs to, if it does."""
    if piece.kind == "reasoning":
        return AnswerDelta(reasoning_content=piece.text)
    if piece.kind == "arguments":
        return AnswerDelta(tool_calls=[CallDelta(index=call, function=FunctionDelta(arguments=piece.text))])
    function = FunctionDelta(name=piece.text, arguments="")
    return AnswerDelta(tool_calls=[CallDelta(index=call, id=_new_id(), type="function", function=function)])


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"
