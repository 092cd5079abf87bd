"""One choice of one request while it is generated: engine outputs in, text with its logprobs out.

The pure half of `generation`: no engine, no tasks, no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from ..core.errors import EngineDied
from .detokenizer import Detokenizer, StopStrings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.types import HandoffReport, RequestOutput, TokenLogprob
    from .tokenizer import Tokenizer


Ending = Literal["stop", "length"]


class TokenInfo(Struct, gc=False):
    """One token with its log-probability, for those who asked for logprobs."""

    token: int
    offset: int
    """Characters of text before the one that it begins or continues."""
    logprob: float | None
    """None for a prompt's first token, which nothing predicts."""
    top: list[tuple[int, float]]
    """(token, logprob), most likely first."""


Verified = dict[tuple[int, int], int]
"""(drafts verified, drafts of these that are tokens of the answer) → how many steps."""


def verification(output: RequestOutput, tokens: int) -> tuple[int, int]:
    """A key of `Verified`. `tokens`: how many of its tokens are part of the answer. Drafts behind them were right for nothing;
    the last of the tokens counts as the target's own, as where a stop id or the budget cuts."""
    return output.drafted, max(0, min(output.accepted, tokens - 1))


class Delta(Struct, gc=False):
    """What one step brought one choice."""

    index: int
    """Of the choice: prompt number × n + choice number."""
    text: str
    tokens: list[int]
    """Without the stop id that ended it."""
    logprobs: list[TokenInfo] | None = None
    """Of the tokens whose text begins in what was given up to here, if asked for."""
    finish_reason: Ending | None = None
    """`stop` or `length`, with the last one."""
    stop: str | int | None = None
    """The stop string or stop id that ended it."""
    new_tokens: int = 0
    """Generated since the last delta, the stop id included."""
    cached_tokens: int = 0
    """With the first delta."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    drafts: Verified | None = None
    """Verifications since the last delta."""
    handoff: HandoffReport | None = None
    """With the first delta, of a request that was handed over."""


class Choice:
    """Detokenizes one sequence and watches for its stop strings."""

    __slots__ = (
        "_detokenizer",
        "_drafts",
        "_generated",
        "_given",
        "_infos",
        "_logprobs",
        "_min_tokens",
        "_plain",
        "_push",
        "_seen",
        "_started",
        "_stops",
        "_untold",
        "index",
    )

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        logprobs: bool = False,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        """`keep`: special tokens that are part of the text."""
        self.index = index
        self._detokenizer = Detokenizer(tokenizer, keep=keep)
        self._push = self._detokenizer.push_all
        self._stops = StopStrings(stops) if stops else None
        self._min_tokens = min_tokens
        self._logprobs = logprobs
        self._infos: list[TokenInfo] = []
        self._generated = 0
        self._started = False
        self._plain = False  # after the first output, if there is nothing but text to look at
        self._drafts: Verified = {}  # that no delta has told of yet
        self._untold = 0  # generated tokens that `text` told of and no delta yet
        self._seen = 0  # characters that tokens have completed
        self._given = 0  # characters handed out

    def text(self, output: RequestOutput) -> str | None:
        """The output's text if that is all there is to tell, which it mostly is; else None, and `take` tells. For the server,
        which asks this for every step and stream."""
        if not self._plain or output.finish_reason is not None:
            return None
        tokens = output.tokens
        self._untold += len(tokens)
        if output.drafted:
            self._verified(output, len(tokens))
        return self._push(tokens)

    def _verified(self, output: RequestOutput, tokens: int) -> None:
        if output.drafted:
            key = verification(output, tokens)
            self._drafts[key] = self._drafts.get(key, 0) + 1

    def _take_drafts(self) -> Verified | None:
        drafts, self._drafts = self._drafts or None, {}
        return drafts

    def take(self, output: RequestOutput) -> Delta:
        """What an engine output means. After a delta with a finish reason there is no more.

        Raises `EngineDied` for an output that says that the engine gave the request up.
        """
        if output.finish_reason == "abort" or output.finish_reason == "error":  # noqa: PLR1714 - mypy narrows this one
            raise EngineDied("The engine gave the request up.", fix="Send it again.")
        tokens = output.tokens
        reason: Ending | None = output.finish_reason
        cached = 0 if self._started else output.cached_tokens
        if not self._started:
            self._started = True
            self._plain = self._stops is None and not self._logprobs
        stop: str | int | None = output.stop_token
        if stop is not None:
            tokens = tokens[:-1]
        if self._plain:
            text = self._push(tokens)
            if reason is not None:
                text += self._detokenizer.flush()
            new_tokens = len(output.tokens) + self._untold
            self._untold = 0
            self._verified(output, len(output.tokens))
            drafts = self._take_drafts()
            delta = Delta(self.index, text, tokens, None, reason, stop, new_tokens, cached, output.prompt_logprobs, drafts)
            delta.handoff = output.handoff
            return delta
        pieces = []
        new_tokens = len(output.tokens)
        for position, token in enumerate(tokens):
            self._generated += 1
            offset = self._seen
            pieces.append(self._release(self._detokenizer.push(token)))
            if self._logprobs and output.logprobs is not None:
                known = output.logprobs[position]
                self._infos.append(TokenInfo(token, offset, known.logprob, known.top))
            if self._stops is not None and self._stops.hit is not None:
                reason, stop = "stop", self._stops.hit
                tokens, new_tokens = tokens[: position + 1], position + 1
                break
        else:
            if reason is not None:
                pieces.append(self._release(self._detokenizer.flush()))
                if self._stops is not None:
                    if self._stops.hit is not None:
                        reason, stop = "stop", self._stops.hit
                    pieces.append(self._stops.flush())
        self._verified(output, new_tokens)
        drafts = self._take_drafts()
        text = "".join(pieces)
        self._given += len(text)
        infos = self._ready_infos(reason is not None, cut=isinstance(stop, str)) if self._logprobs else None
        delta = Delta(self.index, text, tokens, infos, reason, stop, new_tokens, cached, output.prompt_logprobs, drafts)
        delta.handoff = output.handoff
        return delta

    def _release(self, text: str) -> str:
        self._seen += len(text)
        if self._stops is None or self._generated < self._min_tokens:
            return text
        return self._stops.push(text)

    def _ready_infos(self, final: bool, cut: bool) -> list[TokenInfo]:
        """Those whose text has begun to be given; at the end all, but for those that a stop string cut off."""
        if final and not cut:
            ready, self._infos = self._infos, []
            return ready
        ready = [info for info in self._infos if info.offset < self._given]
        self._infos = [] if final else self._infos[len(ready) :]
        return ready
