"""Token ids to text while they arrive: whole characters only, and stop strings found across token borders.

`Detokenizer` turns each token into the characters it completes; `StopStrings` holds back no more than what could still
become a stop string. Both belong to one choice of one request and are used from the event loop.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from .tokenizer import OTHER

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .tokenizer import Tokenizer


class Detokenizer:
    """Feed tokens, get text. What it gives, joined, is the UTF-8 of the tokens' bytes, with U+FFFD for what is none.

    A character whose bytes are spread over tokens comes with the last of them. Special tokens give no text, but for those that
    are to be kept.
    """

    __slots__ = ("_given", "_ids", "_skip", "_tokenizer", "_utf8", "_waiting", "_whole_text")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, keep: frozenset[int] = frozenset()) -> None:
        """`keep`: special tokens that are text all the same, such as the markers of a tool call."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - keep if skip_special_tokens else frozenset()
        self._whole_text = tokenizer.whole
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = False  # the decoder holds the beginning of a character
        self._ids: list[int] | None = [] if tokenizer.kind == OTHER else None
        self._given = 0

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        if not self._waiting:
            text = self._whole_text.get(token)
            if text is not None:
                return text
        if token in self._skip:
            return ""
        if self._ids is not None:
            self._ids.append(token)
            return self._whole(final=False)
        text = self._utf8.decode(self._tokenizer.token_bytes(token))
        self._waiting = bool(self._utf8.getstate()[0])
        return text

    def push_all(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1:  # once a step and stream: no call more than needed
            if not self._waiting:
                text = self._whole_text.get(tokens[0])
                if text is not None:
                    return text
            return self.push(tokens[0])
        return "".join([self.push(token) for token in tokens])

    def flush(self) -> str:
        """At the end: what was waiting for the rest of its character."""
        return self._whole(final=True) if self._ids is not None else self._utf8.decode(b"", final=True)

    def _whole(self, final: bool) -> str:
        """For decoders whose tokens have no bytes of their own (WordPiece, Unigram …): decode it all, give what is new."""
        text = self._tokenizer.decode(self._ids or [], skip_special_tokens=False)
        if not final and text.endswith("�"):
            return ""
        new = text[self._given :]
        self._given = len(text)
        return new


class StopStrings:
    """Finds the string that is complete first in a text that comes in pieces, however it is cut."""

    __slots__ = ("_held", "_longest", "_stops", "hit")

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found; nothing may be pushed after."""

    def push(self, text: str) -> str:
        """What is certain to be part of the answer; the stop string itself and what follows it is not."""
        if not self._longest:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        keep = self._could_begin(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """At the end: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of `text` that some stop string starts with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
