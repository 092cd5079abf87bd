"""Grammars whose matchers run on the host: their requests decode at depth 0 while the others run ahead.

The masks of a step's K + 1 positions depend on the tokens and drafts of the step before, so such a request is in no plan
while a step that names it is in flight (`Sequence.can_decode`). What a step drew and drafted comes back with its result; the
matcher walks it at once, and the masks go into the next plan that names the request:

    collect → accept the tokens → mask; then for each draft that the grammar allows: accept, mask → roll back → plan

Drafts without a mask do not count (`step.grammar.drop_unmasked`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import PluginError
from .types import Feature, TokenMasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .protocols import GrammarMatcher, HostGrammar, Scheduler
    from .sequence import Sequence
    from .types import StepPlan

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    matcher: GrammarMatcher
    kind: str
    masks: list[bytes]
    """Of the next token, and of the token after each draft that the grammar allows."""


class HostMatchers:
    """The matchers of all requests that have one, each at the tokens that were collected."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._open: dict[Sequence, _Open] = {}

    def begin(self, sequence: Sequence, kind: str, grammar: HostGrammar) -> None:
        """For a request that enters. Raises `PluginError` if the matcher fails, or allows nothing."""
        try:
            opened = _Open(grammar.matcher(), kind, [])
        except Exception as error:
            raise _failed(kind, error) from error
        opened.masks = self._masks(sequence, opened, [], [])
        self._open[sequence] = opened
        sequence.on_host = True
        sequence.features ^= Feature.GRAMMAR | Feature.TOKEN_MASKS

    def end(self, sequence: Sequence) -> None:
        self._open.pop(sequence, None)

    def advance(self, sequence: Sequence, tokens: list[int], drafts: list[int]) -> None:
        """A step brought these tokens and left these drafts. Raises `PluginError` where the text cannot go on."""
        opened = self._open.get(sequence)
        if opened is not None:
            opened.masks = self._masks(sequence, opened, tokens, drafts)

    def prepare(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Give the plan the masks of the slots that need them."""
        if not self._open:
            return
        for slot, rows in _positions(plan):
            opened = self._open.get(scheduler.sequence(slot))
            if opened is not None:
                masks = opened.masks[:rows]
                plan.masks.append(TokenMasks(slot, len(masks), b"".join(masks)))

    def _masks(self, sequence: Sequence, opened: _Open, tokens: list[int], drafts: list[int]) -> list[bytes]:
        try:
            return self._walk(sequence, opened.matcher, tokens, drafts)
        except Exception as error:
            raise _failed(opened.kind, error) from error

    def _walk(self, sequence: Sequence, matcher: GrammarMatcher, tokens: list[int], drafts: list[int]) -> list[bytes]:
        for token in tokens:
            if not matcher.accept(token):
                raise ValueError(f"it refused token {token}, which its mask allowed.")
        masks = [self._mask(matcher)]
        if not any(masks[0]):
            raise ValueError("it allows no token; where the text may end it must allow the model's end-of-sequence ids.")
        for draft in drafts:
            # Nothing is drawn behind an end.
            if draft in sequence.stop_ids or not matcher.accept(draft):
                break
            masks.append(self._mask(matcher))
        matcher.rollback(len(masks) - 1)
        return masks

    def _mask(self, matcher: GrammarMatcher) -> bytes:
        mask = memoryview(bytearray(4 * self._words)).cast("i")
        matcher.fill(mask)
        return mask.tobytes()


def _positions(plan: StepPlan) -> Iterator[tuple[int, int]]:
    """Slots that get tokens, and at how many positions."""
    for chunk in plan.prefill:
        if chunk.last:
            yield chunk.slot, 1
    for slot in plan.decode:
        yield slot, plan.drafting.verify + 1


def _failed(kind: str, error: Exception) -> PluginError:
    log.warning("the matcher of a grammar of kind %r failed", kind, exc_info=error)
    return PluginError(f"The matcher of the grammar of kind {kind!r} failed: {type(error).__name__}: {error}", param="grammar")
