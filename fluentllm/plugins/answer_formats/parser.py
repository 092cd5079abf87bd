"""What all formats' parsers do alike: reasoning first, then content with calls in it, which each format finds its way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fluentllm.core.protocols import Piece

from .reading import WAIT, could_begin, expect, skip_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.protocols import PieceKind, Where

Reasoning = tuple[str, str]
"""The markers before and behind it."""


class Parser(ABC):
    """Implements `core.protocols.AnswerParser`. Its states are methods, which read from `_text`; each says whether the next
    may go on at once (True) or text is missing (False). With `_final` none is: then a state must go on or read everything."""

    def __init__(self, reasoning: Reasoning | None, *, where: Where, separate_reasoning: bool, calls: bool) -> None:
        """`calls`: look for them."""
        self._text = ""
        self._final = False
        self._pieces: list[Piece] = []
        self._open, self._close = reasoning or ("", "")
        self._separate = separate_reasoning
        self._calls = calls
        states: dict[Where, Callable[[], bool]] = {
            "before": self._before,
            "inside": self._opened,
            "behind": self._answer,
        }
        looks = reasoning is not None and (calls or separate_reasoning)
        self._state = states[where] if looks else self._answer
        self.plain = not calls and (not looks or where == "behind")

    def feed(self, text: str) -> list[Piece]:
        if self.plain:
            return [Piece("content", text)] if text else []
        self._text += text
        return self._run()

    def flush(self) -> list[Piece]:
        self._final = True
        return self._run()

    def _run(self) -> list[Piece]:
        while self._state():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    # ----------------------------------------------------------------------------------------------------- what states use
    def _give(self, kind: PieceKind, text: str) -> None:
        if text or kind in ("call", "end"):
            self._pieces.append(Piece(kind, text))

    def _take(self, count: int) -> str:
        """The first characters of the text, which are no longer in it."""
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _give_until(self, kind: PieceKind, marker: str) -> bool:
        """Give what stands before `marker`, but for white space just before it, which belongs to the marker. True if it is
        there; the text then begins with that space. Else what may still become the marker is held back."""
        found = self._text.find(marker)
        end = found if found >= 0 else len(self._text) - could_begin(self._text, marker)
        if found < 0 and self._final:
            self._give(kind, self._take(len(self._text)))
            return False
        self._give(kind, self._take(len(self._text[:end].rstrip())))
        return found >= 0

    def _drop_space(self) -> bool:
        """True if something follows it, or nothing ever will."""
        self._text = self._text.lstrip()
        return bool(self._text) or self._final

    # ------------------------------------------------------------------------------------------------------------ reasoning
    def _before(self) -> bool:
        at = skip_space(self._text, 0)
        end = expect(self._text, at, self._open)
        if end > 0:
            if self._separate:
                self._take(end)
            self._state = self._opened
            return True
        if end == WAIT and not self._final:
            return False
        self._state = self._answer
        return True

    def _opened(self) -> bool:
        """Just behind the opening marker; or before it, if reasoning is not told apart."""
        if not self._separate:
            self._state = self._unseparated
            return True
        if self._drop_space():
            self._state = self._reasoning
            return True
        return False

    def _reasoning(self) -> bool:
        if self._give_until("reasoning", self._close):
            self._take(skip_space(self._text, 0) + len(self._close))
            self._state = self._behind_marker
            return True
        return False

    def _unseparated(self) -> bool:
        """Markers and white space stay; but what looks like a call in here is none."""
        found = self._text.find(self._close)
        if found < 0:
            held = 0 if self._final else could_begin(self._text, self._close)
            self._give("content", self._take(len(self._text) - held))
            return False
        self._give("content", self._take(found + len(self._close)))
        self._state = self._answer
        return True

    def _behind_marker(self) -> bool:
        if self._drop_space():
            self._state = self._answer
            return True
        return False

    # -------------------------------------------------------------------------------------------------------------- answers
    def _answer(self) -> bool:
        self._state = self._first if self._calls else self._rest
        return True

    @abstractmethod
    def _first(self) -> bool:
        """The format's own: where calls are looked for."""

    def _rest(self) -> bool:
        """Nothing but content from here on."""
        self.plain = True
        self._give("content", self._take(len(self._text)))
        return False


def where_answers_begin(reasoning: Reasoning | None, prompt_end: str) -> Where:
    """Behind a prompt that ends like this, white space aside."""
    if reasoning is None:
        return "behind"
    end = prompt_end.rstrip()
    return "inside" if end.endswith(reasoning[0]) else "behind" if end.endswith(reasoning[1]) else "before"
