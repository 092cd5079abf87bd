"""The policy: decodes first, then prompts, the shortest first.

A request enters only once there are pages for all that it may ever generate, so nothing needs to be preempted: simpler than
FluentLLM's own policy, and less dense.

Steps may be in flight while the next is planned. A slot and its pages are given back only when every step that names them
has been collected; until then the sequence is leaving.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from fluentllm.core.errors import QueueFull
from fluentllm.core.sequence import Phase
from fluentllm.core.types import PrefillChunk, SlotInit, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence as SequenceOf

    from fluentllm.core.protocols import SchedulerContext
    from fluentllm.core.sequence import Sequence
    from fluentllm.core.types import Drafting


def order_key(priority: int, prompt_length: int, arrival: int, *, overdue: bool) -> tuple[int, int, int, int]:
    """Smaller runs first. Among overdue requests of a priority, the oldest."""
    return (priority, 0, 0, arrival) if overdue else (priority, 1, prompt_length, arrival)


class ShortestFirstScheduler:
    """Implements `fluentllm.core.protocols.Scheduler`."""

    preemptions = 0

    def __init__(self, context: SchedulerContext, patience: int) -> None:
        self._kv = context.kv
        self._max_drafts = context.max_drafts
        self._patience = patience
        self._max_waiting = context.settings.scheduler.max_waiting
        self._prefill_budget = context.prefill
        self._overtaken: dict[Sequence, int] = {}
        """Waiting sequence → how many later ones have entered before it."""
        self._slots: dict[int, Sequence] = {}
        self._free_slots = list(range(context.slots))
        self._leaving: set[Sequence] = set()
        self._collected_step = -1

    @property
    def waiting(self) -> int:
        return len(self._overtaken)

    @property
    def running(self) -> int:
        return len(self._slots)

    def sequence(self, slot: int) -> Sequence:
        return self._slots[slot]

    def add(self, sequence: Sequence) -> None:
        if len(self._overtaken) >= self._max_waiting:
            raise QueueFull(f"{self.waiting} requests are waiting.", fix="Try again later, or raise scheduler.max_waiting.")
        self._overtaken[sequence] = 0

    def abort(self, sequence: Sequence) -> None:
        if sequence.slot is None:
            del self._overtaken[sequence]
        else:
            self._leave(sequence)

    def plan(self, step: int, drafting: Drafting) -> StepPlan | None:
        decode = [slot for slot, sequence in self._slots.items() if sequence.can_decode and sequence not in self._leaving]
        admit, prefill = self._plan_prefill(self._prefill_budget.tokens(len(decode)))
        if not decode and not prefill:
            return None
        sampling = [self._slots[slot] for slot in (*decode, *(chunk.slot for chunk in prefill if chunk.last))]
        features = 0
        for sequence in sampling:
            features |= sequence.features
        plan = StepPlan(step=step, admit=admit, prefill=prefill, decode=decode, drafting=drafting, features=features)
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
            self._leave(sequence)
        for sequence in [each for each in self._leaving if each.last_step <= plan.step]:
            self._release(sequence)

    def _named(self, plan: StepPlan) -> Iterator[tuple[Sequence, int]]:
        """Whom the plan names, each with the most tokens that the step can bring it."""
        for chunk in plan.prefill:
            yield self._slots[chunk.slot], int(chunk.last)
        for slot in plan.decode:
            yield self._slots[slot], plan.drafting.verify + 1

    def _plan_prefill(self, budget: int) -> tuple[list[SlotInit], list[PrefillChunk]]:
        admit: list[SlotInit] = []
        chunks: list[PrefillChunk] = []
        for sequence in self._slots.values():
            if sequence.phase is Phase.PREFILL and sequence not in self._leaving and budget > 0:
                chunks.append(self._next_chunk(sequence, budget))
                budget -= chunks[-1].count
        while budget > 0 and self._overtaken:
            sequence = min(self._overtaken, key=self._key)
            if not self._admit(sequence):
                break
            admit.append(self._enter(sequence))
            chunks.append(self._next_chunk(sequence, budget))
            budget -= chunks[-1].count
        return admit, chunks

    def _key(self, sequence: Sequence) -> tuple[int, int, int, int]:
        overdue = self._overtaken[sequence] >= self._patience
        return order_key(sequence.request.priority, sequence.prompt_length, sequence.arrival, overdue=overdue)

    def _admit(self, sequence: Sequence) -> bool:
        """A slot, and pages for all of its budget."""
        if not self._free_slots or not self._kv.admit(sequence, len(sequence.tokens)):
            return False
        if self._kv.reserve(sequence, sequence.budget_end + 2 * self._max_drafts) is None:
            self._kv.release(sequence)
            return False
        return True

    def _enter(self, sequence: Sequence) -> SlotInit:
        del self._overtaken[sequence]
        for other in self._overtaken:
            if other.arrival < sequence.arrival:
                self._overtaken[other] += 1
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.generation += 1
        sequence.phase = Phase.PREFILL
        self._slots[sequence.slot] = sequence
        return SlotInit(
            sequence.slot,
            sequence.generation,
            list(sequence.tokens),
            sequence.prompt_length,
            sequence.prefilled,
            list(sequence.pages),
            sequence.request.params,
            sequence.stop_ids,
        )

    def _next_chunk(self, sequence: Sequence, budget: int) -> PrefillChunk:
        start = sequence.prefilled
        count = min(budget, len(sequence.tokens) - start)
        sequence.prefilled += count
        last = sequence.prefilled == len(sequence.tokens)
        if last:
            sequence.phase = Phase.DECODE
        assert sequence.slot is not None
        return PrefillChunk(sequence.slot, start, count, last, sequence.request.params.prompt_logprobs)

    def _leave(self, sequence: Sequence) -> None:
        self._leaving.add(sequence)
        if sequence.last_step <= self._collected_step:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._leaving.remove(sequence)
        if sequence.finish_reason != "abort":
            # The last token's KV would be written by the step after it, which there was not.
            self._kv.publish(sequence, len(sequence.tokens) - 1)
        self._kv.release(sequence)
        assert sequence.slot is not None
        del self._slots[sequence.slot]
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
