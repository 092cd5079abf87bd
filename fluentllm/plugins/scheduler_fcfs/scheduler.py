"""Who runs in the next step: decodes first, then prompts in chunks, in order of (priority, arrival).

Continuous batching with chunked prefill: every running sequence that can decode does, and what is left of the step's
budget of prompt tokens goes to prompts that have begun, then to those that wait. With `scheduler.prefill_first` it is the
other way round: while there is a prompt to compute, nobody decodes. When pages run short the last in order
gives its own back and waits; its KV stays in the radix tree as long as nobody needs the room, so coming back is cheap.

Steps in flight: a slot and its pages are released only when every step that names them has been collected. Until then the
sequence is *leaving*.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator, Sequence as SequenceOf

from ...core.errors import QueueFull
from ...core.prefill_budget import StepAllowance
from ...core.protocols import SchedulerContext
from ...core.sequence import Phase, Sequence
from ...core.types import Drafting, PageGrant, PrefillChunk, SlotInit, StepPlan


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


class FcfsScheduler:
    """Implements `core.protocols.Scheduler`."""

    def __init__(self, context: SchedulerContext) -> None:
        settings = context.settings.scheduler
        self._kv = context.kv
        self._max_waiting = settings.max_waiting
        self._prefill_budget = context.prefill
        self._prefill_first = settings.prefill_first
        self._max_drafts = context.max_drafts
        self._waiting: list[Sequence] = []
        self._resuming: list[Sequence] = []
        """They have their prompts' KV in pages of their own, and wait for a slot."""
        self._running: list[Sequence] = []
        self._leaving: dict[Sequence, bool] = {}
        """Sequence → whether it waits again once released (preempted) or is done with."""
        self._short: Sequence | None = None
        """The first that could not decode for want of pages when decodes were last planned."""
        self._slots: dict[int, Sequence] = {}
        self._free_slots = list(range(context.slots))
        self._collected_step = -1
        self._preemptions = 0

    # ------------------------------------------------------------------------------------------------------------ protocol
    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._resuming)

    @property
    def running(self) -> int:
        return len(self._slots)

    @property
    def preemptions(self) -> int:
        return self._preemptions

    def sequence(self, slot: int) -> Sequence:
        return self._slots[slot]

    def add(self, sequence: Sequence) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting.", fix="Try again later, or raise scheduler.max_waiting."
            )
        insort(self._waiting, sequence, key=_order)

    def resume(self, sequence: Sequence) -> None:
        insort(self._resuming, sequence, key=_order)

    def abort(self, sequence: Sequence) -> None:
        if sequence in self._resuming:
            self._resuming.remove(sequence)
            self._kv.release(sequence)
        elif sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence, again=False)

    def plan(self, step: int, drafting: Drafting) -> StepPlan | None:
        grants: list[PageGrant] = []
        admit: list[SlotInit] = []
        prefill = self._plan_prefill(step, admit, self._prefill_budget.allow(0)) if self._prefill_first else []
        decode: list[int] = []
        resume: list[PrefillChunk] = []
        if not prefill:
            decode = self._plan_decode(step, drafting, grants)
            resume = self._plan_resume(step, drafting, admit, grants)
            decode += [chunk.slot for chunk in resume]
        if not self._prefill_first:
            prefill = self._plan_prefill(step, admit, self._prefill_budget.allow(len(decode)))
        if not decode and not prefill:
            return self.plan(step, drafting) if self._give_up_a_resumption() else None
        plan = StepPlan(
            step=step,
            admit=admit,
            grants=grants,
            prefill=prefill,
            resume=resume,
            decode=decode,
            drafting=drafting,
            features=self._features(decode, prefill),
        )
        for sequence, tokens in self._named(plan):
            sequence.launch(step, tokens)
        return plan

    def collected(self, plan: StepPlan, finished: SequenceOf[Sequence]) -> None:
        self._collected_step = plan.step
        for sequence, tokens in self._named(plan):
            sequence.collect(tokens)
        for chunk in plan.prefill:
            self._kv.publish(self._slots[chunk.slot], chunk.start + chunk.count)
        for sequence in finished:
            self._leave(sequence, again=False)
        for sequence in [s for s in self._leaving if s.last_step <= plan.step]:
            self._release(sequence)

    # ------------------------------------------------------------------------------------------------------------ planning
    def _plan_decode(self, step: int, drafting: Drafting, grants: list[PageGrant]) -> list[int]:
        slots = []
        self._short = None
        ahead = self._ahead(drafting)
        for sequence in list(self._running):
            if not sequence.can_decode or sequence in self._leaving:
                continue
            if self._grow(sequence, ahead, grants):
                sequence.last_step = step  # so that making room for others does not take it out of this very plan
                assert sequence.slot is not None
                slots.append(sequence.slot)
            elif self._short is None:
                self._short = sequence
        return slots

    def _ahead(self, drafting: Drafting) -> int:
        """Tokens past its end that a step may write KV for."""
        # A draft layer writes KV for the newest token too, even while nothing is drafted.
        return drafting.verify + max(drafting.draft, min(self._max_drafts, 1))

    def _plan_resume(self, step: int, drafting: Drafting, admit: list[SlotInit], grants: list[PageGrant]) -> list[PrefillChunk]:
        """Their pages were reserved with their prompts', so they need a slot and no more."""
        chunks = []
        while self._resuming and self._free_slots:
            sequence = self._resuming.pop(0)
            admit.append(self._enter(sequence))
            sequence.phase = Phase.DECODE
            sequence.last_step = step  # as above
            assert sequence.slot is not None
            chunks.append(PrefillChunk(sequence.slot, sequence.prompt_length - 1, 1, True))
            self._grow(sequence, self._ahead(drafting), grants)
        return chunks

    def _named(self, plan: StepPlan) -> Iterator[tuple[Sequence, int]]:
        """Whom a plan names, each with the most tokens that the step can bring it."""
        for chunk in plan.prefill:
            yield self._slots[chunk.slot], int(chunk.last)
        for slot in plan.decode:
            yield self._slots[slot], plan.drafting.verify + 1

    def _features(self, decode: list[int], prefill: list[PrefillChunk]) -> int:
        features = 0
        for slot in (*decode, *(chunk.slot for chunk in prefill if chunk.last)):
            features |= self._slots[slot].features
        return features

    def _grow(self, sequence: Sequence, drafts: int, grants: list[PageGrant]) -> bool:
        """Pages for the KV that the next step writes; those behind it in order give theirs up for it."""
        while True:
            first = len(sequence.pages)
            pages = self._kv.reserve(sequence, sequence.longest + drafts)
            if pages is not None:
                if pages:
                    assert sequence.slot is not None
                    grants.append(PageGrant(sequence.slot, first, pages))
                return True
            if not self._preempt_after(_order(sequence)):
                return False

    def _plan_prefill(self, step: int, admit: list[SlotInit], allowance: StepAllowance) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        for sequence in self._running:
            if sequence.phase is Phase.PREFILL and sequence not in self._leaving:
                count = allowance.take(sequence.prefilled, len(sequence.tokens) - sequence.prefilled)
                if count:
                    chunks.append(self._next_chunk(step, sequence, count))
        while allowance.open and self._waiting:
            sequence = self._waiting[0]
            # Else, with prompts first, who gave its pages up for another would have them again before the other took any.
            if self._short is not None and _order(self._short) < _order(sequence):
                break
            if not self._make_room(sequence):
                break
            self._waiting.pop(0)
            admit.append(self._enter(sequence))
            count = allowance.take(sequence.prefilled, len(sequence.tokens) - sequence.prefilled)
            # What is open for a prompt's begin may be closed behind a cached prefix; who has entered computes something.
            chunks.append(self._next_chunk(step, sequence, max(1, count)))
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """A slot, and pages for all tokens it has so far and the first drafts; from sequences of lower priority if need be."""
        priority = sequence.request.priority
        while not (self._free_slots and self._admit(sequence)):
            # Only a strictly lower priority yields to a newcomer: among equals the one that runs stays.
            if not self._preempt_after((priority + 1, -1)):
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        length = len(sequence.tokens)
        if not self._kv.admit(sequence, length):
            return False
        if self._max_drafts and self._kv.reserve(sequence, length + self._max_drafts) is None:
            self._kv.release(sequence)
            return False
        return True

    def _enter(self, sequence: Sequence) -> SlotInit:
        slot = heapq.heappop(self._free_slots)
        sequence.slot = slot
        sequence.generation += 1
        sequence.phase = Phase.PREFILL
        self._slots[slot] = sequence
        insort(self._running, sequence, key=_order)
        return SlotInit(
            slot,
            sequence.generation,
            list(sequence.tokens),
            sequence.prompt_length,
            sequence.prefilled,
            list(sequence.pages),
            sequence.request.params,
            sequence.stop_ids,
        )

    def _next_chunk(self, step: int, sequence: Sequence, count: int) -> PrefillChunk:
        sequence.last_step = step  # as in `_plan_decode`: behind its last chunk it may have to make room
        start = sequence.prefilled
        sequence.prefilled = start + count
        last = sequence.prefilled == len(sequence.tokens)
        if last:
            sequence.phase = Phase.DECODE
        # A sequence that comes back after a preemption has told its prompt's logprobs already.
        wanted = sequence.request.params.prompt_logprobs if sequence.generated == 0 else None
        assert sequence.slot is not None
        return PrefillChunk(sequence.slot, start, count, last, wanted)

    # ------------------------------------------------------------------------------------------------------------- leaving
    def _give_up_a_resumption(self) -> bool:
        """Where nothing moves any more: those who run are short of the pages of those who wait for their slots. True if the
        last of these has given its own back; it is computed here."""
        flying = any(sequence.last_step > self._collected_step for sequence in self._running)
        if self._short is None or flying or not self._resuming:
            return False
        sequence = self._resuming.pop()
        self._kv.release(sequence)
        self._wait_again(sequence)
        return True

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        sequence.prefilled = 0
        insort(self._waiting, sequence, key=_order)

    def _preempt_after(self, order: tuple[int, int]) -> bool:
        """Make the last sequence behind `order` leave. True if its pages are free at once; False if there is none, or
        steps in flight still name it (its pages come when they are collected)."""
        if any(again for again in self._leaving.values()):
            return False
        victim = next((s for s in reversed(self._running) if s.phase is Phase.DECODE and s not in self._leaving), None)
        if victim is None or _order(victim) <= order:
            return False
        self._preemptions += 1
        self._leave(victim, again=True)
        return victim not in self._leaving

    def _leave(self, sequence: Sequence, *, again: bool) -> None:
        self._leaving[sequence] = again
        if sequence is self._short:
            self._short = None
        if sequence.last_step <= self._collected_step:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        again = self._leaving.pop(sequence)
        if sequence.finish_reason != "abort" and sequence.phase is not Phase.PREFILL:
            # The last token's KV is written only by the step after it.
            self._kv.publish(sequence, len(sequence.tokens) - 1)
        self._kv.release(sequence)
        self._running.remove(sequence)
        assert sequence.slot is not None
        del self._slots[sequence.slot]
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        if again:
            self._wait_again(sequence)
