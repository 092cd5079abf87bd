"""A benchmark for `DraftLength` that is made up: rounds of requests that begin together and end one after the other, on a GPU
whose programs stall when they are new. One step is launched ahead of what was read."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise
from math import log2
from typing import Literal

from drafting import RIGHT, WRONG, Cost

from fluentllm.core.buckets import bucket_of
from fluentllm.core.draft_length import DraftLength
from fluentllm.core.types import Drafting, PrefillChunk, SamplingParams, SlotInit, SlotResult, StepPlan, StepResult

MAX_K = 3
EAGER, CAPTURE = 3.0, 0.06
"""A program's first run takes so many times as long; its second so many seconds more."""
PROMPT, PROMPTS_A_STEP = 1024, 8
"""Tokens of a prompt, and how many prompts a step takes."""
PASS_MS = ((1, 2.1), (4, 3.9), (8, 5.7), (32, 9.2), (128, 12.6), (512, 17.5), (1024, 25.0))
"""(rows, milliseconds of a pass): DeepSeek-V3-Lite on an H200, a little smoothed."""
DRAFT_MS = 0.15


def gpu(batch: int, verify: int, leave: int) -> float:
    """Seconds of a step, between the measured sizes by the logarithm of its rows."""
    rows = batch * (verify + 1)
    for (few, short), (many, long) in pairwise(PASS_MS):
        if rows <= many:
            share = log2(rows / few) / log2(many / few)
            return (short + share * (long - short) + DRAFT_MS * leave) / 1e3
    raise ValueError(f"{rows} rows are more than were measured")


@dataclass
class Round:
    """What a round took, its prompts not counted."""

    seconds: float = 0.0
    """Without stalls."""
    stalls: float = 0.0
    of_requests: float = 0.0
    """As `seconds`, until a request ended: the mean of all."""


@dataclass
class Bench:
    """One engine. A draft is right with the probability `acceptance` if those before it were."""

    k: int | Literal["auto"]
    acceptance: float
    seed: int = 1
    cost: Cost = gpu
    ran: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """(bucket, drafts verified, drafts left) → how often."""

    def __post_init__(self) -> None:
        self._lengths = DraftLength(self.k, MAX_K)
        self._rng = random.Random(self.seed)
        self._step = 0

    def rounds(self, batch: int, tokens: int, count: int) -> list[Round]:
        return [self._round(batch, tokens) for _ in range(count)]

    def _round(self, batch: int, tokens: int) -> Round:
        took, generation = Round(), self._step
        waiting, running = deque(range(batch)), list[int]()
        room, left = dict.fromkeys(range(batch), tokens), dict[int, list[int]]()
        ahead = deque[tuple[StepPlan, StepResult]]()
        while waiting or running:
            k, look = self._lengths.choose(len(running))
            prompts = [waiting.popleft() for _ in range(min(PROMPTS_A_STEP, len(waiting)))]
            params = SamplingParams(max_tokens=tokens)
            plan = StepPlan(
                step=self._step,
                admit=[SlotInit(slot, generation, [1], PROMPT, 0, [], params, []) for slot in prompts],
                prefill=[PrefillChunk(slot, 0, PROMPT, True) for slot in prompts],
                decode=list(running),
                drafting=Drafting(k, k + look, look),
            )
            self._lengths.planned(plan)
            slots = []
            for slot in [*prompts, *plan.decode]:
                slots.append(self._advance(slot, generation, room, left.get(slot, [])[:k]))
                left[slot] = self._drafts(k + look)
                if look:
                    slots[-1].drafts = left[slot]
            seconds = self._time(plan, took) if plan.decode else 0.0
            took.of_requests += took.seconds * sum(slot.finished is not None for slot in slots) / batch
            running.extend(prompts)
            self._step += 1
            ahead.append((plan, StepResult(step=plan.step, slots=slots, seconds=seconds, verified=k)))
            while len(ahead) > 1 or (ahead and not any(room.values())):
                for slot_result in ahead[0][1].slots:
                    if slot_result.finished is not None:
                        running.remove(slot_result.slot)
                self._lengths.collected(*ahead.popleft())
        return took

    def _advance(self, slot: int, generation: int, room: dict[int, int], drafts: list[int]) -> SlotResult:
        right = drafts.index(WRONG) if WRONG in drafts else len(drafts)
        count = min(right + 1, room[slot])
        finished = bool(count) and count == room[slot]
        room[slot] -= count
        accepted = max(0, min(right, count - 1))
        return SlotResult(
            slot, generation, [RIGHT] * count, "length" if finished else None, drafted=len(drafts), accepted=accepted
        )

    def _drafts(self, count: int) -> list[int]:
        right = 0
        while right < count and self._rng.random() < self.acceptance:
            right += 1
        return [RIGHT] * right + [WRONG] * (count - right)

    def _time(self, plan: StepPlan, took: Round) -> float:
        """As the device measures it."""
        program = bucket_of(len(plan.decode)), plan.drafting.verify, plan.drafting.draft
        seconds = self.cost(*program) * self._rng.gauss(1, 0.01)
        self.ran[program] += 1
        stall = {1: (EAGER - 1) * seconds, 2: CAPTURE}.get(self.ran[program], 0.0)
        took.seconds += seconds
        took.stalls += stall
        return seconds + stall
