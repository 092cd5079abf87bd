"""How many drafts were verified and accepted, by position: what the engine's statistics say of speculation."""

from __future__ import annotations

from .draft_watchdog import AcceptanceWatch
from .types import SlotResult, SpeculativeInfo, SpeculativeStats


class DraftCounts:
    """Fed by the engine with what every collected step brought every slot."""

    def __init__(self, info: SpeculativeInfo, watch: AcceptanceWatch | None = None) -> None:
        self.info = info
        self._watch = watch
        self.error: str | None = None
        self._verifications = 0
        self._drafted = [0] * info.max_k
        self._accepted = [0] * info.max_k

    def add(self, slot: SlotResult) -> None:
        if not slot.drafted:
            return
        self._verifications += 1
        for position in range(slot.drafted):
            self._drafted[position] += 1
        for position in range(slot.accepted):
            self._accepted[position] += 1

    def stats(self) -> SpeculativeStats:
        return SpeculativeStats(
            info=self.info,
            verifications=self._verifications,
            drafted=list(self._drafted),
            accepted=list(self._accepted),
            error=self.error,
            collapsed=self._watch is not None and self._watch.collapsed,
            collapses=self._watch.collapses if self._watch is not None else 0,
        )
