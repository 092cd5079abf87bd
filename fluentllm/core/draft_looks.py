"""Drafts that are only looked at: kept until the token comes that says whether they were right. Torch-free."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import SlotResult, StepPlan, StepResult


class Looks:
    """What the last step that brought a slot tokens left beyond what it verified itself: one draft a slot."""

    def __init__(self, synthetic: float | None = None) -> None:
        """`synthetic`: share of drafts that are accepted whatever they are; what is looked at has the same chance."""
        self._chance = synthetic
        self._coins = random.Random(0)
        self.place = 0
        """Drafts before it, which are verified."""
        self._expected: dict[int, tuple[int, int | None]] = {}
        """Slot → its generation, and the draft if it had one."""

    def expect(self, plan: StepPlan, result: StepResult) -> None:
        """A step was collected. One over prompts alone leaves the other slots as they are."""
        place = plan.drafting.draft - 1
        if plan.decode or (plan.drafting.look and place != self.place):
            self._expected = {}
        if plan.drafting.look:
            self.place = place
            for slot in result.slots:
                if slot.tokens:
                    draft = slot.drafts[place] if place < len(slot.drafts) else None
                    self._expected[slot.slot] = slot.generation, draft

    def see(self, slot: SlotResult) -> tuple[int, int] | None:
        """What the step after it brought a slot → (drafts, right ones), those before it included; None: nothing to learn, or
        what was to be looked at has been verified."""
        generation, draft = self._expected.get(slot.slot, (-1, None))
        place = self.place
        if generation != slot.generation or slot.drafted > place or slot.accepted < place or len(slot.tokens) <= place:
            return None
        if draft is None:
            return (0, 0) if not place else None
        right = slot.tokens[place] == draft if self._chance is None else self._coins.random() < self._chance
        return place + 1, place + right
