"""Who runs when."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..prefill_budget import PrefillBudget

if TYPE_CHECKING:
    from ..kv.cache import KVCache
    from ..sequence import Sequence
    from ..settings import Settings
    from ..types import Drafting, StepPlan


@dataclass(frozen=True, slots=True)
class SchedulerContext:
    """What a policy is made from. `kv` does the bookkeeping of pages; the policy decides who runs."""

    settings: Settings
    kv: KVCache
    slots: int
    """Sequences that can be on the device at once."""
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_drafts: int = 0
    """A step may write KV for twice as many tokens past the end of a sequence."""
    prefill: PrefillBudget = field(default_factory=lambda: PrefillBudget(512, None))
    """`prefill.tokens(decoding)`: most prompt tokens of a step in which so many sequences decode."""


class Scheduler(Protocol):
    """Decides what each step computes. Called from the engine's loop only; may not block.

    The engine launches up to `overlap_depth` steps ahead of what it has collected, so `plan` must count on the longest
    that a sequence can be (`Sequence.longest`), not on what is known of it.
    """

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises `QueueFull`."""
        ...

    def resume(self, sequence: Sequence) -> None:
        """Queue one that has the KV of its whole prompt in pages of its own, and its first token: it enters a slot to decode,
        without a prefill (`StepPlan.resume`). Never refused, and not kept waiting behind what waits for pages."""
        ...

    def abort(self, sequence: Sequence) -> None:
        """Plan it no more; its slot and pages are released once every step that names it has been collected."""
        ...

    def plan(self, step: int, drafting: Drafting) -> StepPlan | None:
        """The next step, or None if nothing can run now.

        Every sequence that decodes brings at most `drafting.verify` + 1 tokens and needs pages for
        `Sequence.longest` + `drafting.verify` + `drafting.draft` tokens, and where anything drafts (`max_drafts` > 0) for
        `Sequence.longest` + `drafting.verify` + 1 at least; a prompt's last chunk needs them for `max_drafts` tokens past the
        prompt. What is missing is not written, so drafts get worse. `drafting` goes into the plan as it is. Each sequence in
        the plan is told by `Sequence.launch`, and again by `Sequence.collect` when the step was collected.
        """
        ...

    def collected(self, plan: StepPlan, finished: SequenceOf[Sequence]) -> None:
        """The step's results are in the sequences; release what no step names any more."""
        ...

    def sequence(self, slot: int) -> Sequence:
        """Who holds the slot."""
        ...

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def preemptions(self) -> int: ...
