"""Watches whether drafts are right at all: acceptance that collapses is told, and drafting stops for a while.

The cost model (`draft_length`) stops what does not pay by measured times; this rule holds for a fixed K too, and for drafts
that `auto` only looks at. A proposer that is right less often than `least` is broken or out of its element: a wrong draft
model, a text unlike any before.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

ENOUGH = 512
"""First drafts that are seen before a verdict."""
ENOUGH_AGAIN = 128
"""And when it is tried again."""
FIRST_PAUSE, LAST_PAUSE = 1024, 65536
"""Steps without drafts: doubled each time that trying again was no better."""


class AcceptanceWatch:
    """Fed by the engine with every collected step. Torch-free."""

    def __init__(self, least: float, proposer: str = "") -> None:
        """`least`: share of first drafts that must be right; 0 switches the watch off. `proposer`: how the log calls it."""
        self.least = least
        self.collapses = 0
        """Times that it switched drafting off."""
        self.collapsed = False
        """Since the last verdict; also while it is tried again."""
        self._proposer = proposer
        self._drafted = self._accepted = 0
        self._enough = ENOUGH
        self._pause = FIRST_PAUSE
        self._left = 0

    def allows(self) -> bool:
        """Whether the step that is being planned may draft. Once a step."""
        if self._left:
            self._left -= 1
            return False
        return True

    def saw(self, drafted: int, accepted: int) -> None:
        """First drafts that a step verified or looked at, and how many of these were right."""
        if not self.least or self._left:
            return  # what comes in while it pauses was launched before
        self._drafted += drafted
        self._accepted += accepted
        if self._drafted < self._enough:
            return
        share = self._accepted / self._drafted
        self._drafted = self._accepted = 0
        if share < self.least:
            self._collapse(share)
        elif self.collapsed:
            log.info("drafts of %s are accepted again: %.1f %% of the first ones", self._proposer, 100 * share)
            self.collapsed, self._enough, self._pause = False, ENOUGH, FIRST_PAUSE

    def _collapse(self, share: float) -> None:
        self.collapses += 1
        log.warning(
            "acceptance of %s has collapsed: %.1f %% of its first drafts are right, speculative.min_acceptance is %.1f %%. "
            "It is switched off, and tried again in %d steps.",
            self._proposer,
            100 * share,
            100 * self.least,
            self._pause,
        )
        self.collapsed, self._enough, self._left = True, ENOUGH_AGAIN, self._pause
        self._pause = min(2 * self._pause, LAST_PAUSE)
