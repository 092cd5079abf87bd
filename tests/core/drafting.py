"""An engine and a device for `DraftLength` that are made up: so many sequences, whose drafts are right by a coin, and what each
program takes. Steps follow one another at overlap depth 0."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fluentllm.core.draft_length import DraftLength
from fluentllm.core.types import Drafting, SamplingParams, SlotInit, SlotResult, StepPlan, StepResult

Cost = Callable[[int, float, int], float]
"""(sequences, drafts verified of each, drafts left) → seconds."""
RIGHT, WRONG = 1, 2


@dataclass
class World:
    """`batch` sequences; a draft is right with the probability `acceptance` if those before it were, and a sequence has drafts
    with the probability `offered`."""

    cost: Cost
    batch: int
    acceptance: float
    offered: float = 1.0
    eager: bool = False
    """The program verifies nothing where no sequence has drafts."""
    experts: bool = False
    """Rows of drafts that a sequence was not left take no time, in a program that verifies all the same."""
    noise: bool = False
    """Times as they are measured: 2 % to and fro, one in a hundred eight times as long, and a program's first run too, or the
    first two where it is captured."""
    rng: random.Random = field(default_factory=random.Random)
    ran: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How often each program was run: that of an engine which has run before."""
    time: float = 0.0
    tokens: float = 0.0
    """Of a sequence."""
    chosen: list[int] = field(default_factory=list)
    """How many drafts each step left to be verified."""
    looks: int = 0
    sampled: bool = False

    def __post_init__(self) -> None:
        self._step, self._new = 0, True
        self._left: list[list[int]] = [[]] * self.batch

    def run(self, lengths: DraftLength, steps: int) -> World:
        for _ in range(steps):
            self._run(lengths)
        return self

    def until(self, lengths: DraftLength, tokens: int) -> World:
        """Until a sequence has got so many more."""
        end = self.tokens + tokens
        while self.tokens < end:
            self._run(lengths)
        return self

    def rate(self) -> float:
        return self.tokens / self.time

    def fixed(self, k: int) -> float:
        """Tokens a second of a fixed K, in the long run."""
        tokens = 1 + self.offered * sum(self.acceptance**j for j in range(1, k + 1))
        if self.experts:
            return tokens / self.cost(self.batch, self.offered * k, k)
        verifies = 1 - (1 - self.offered) ** self.batch if self.eager else 1.0
        return tokens / (verifies * self.cost(self.batch, k, k) + (1 - verifies) * self.cost(self.batch, 0, k))

    def _run(self, lengths: DraftLength) -> None:
        k, look = lengths.choose(self.batch)
        admit = []
        if self._new:
            params = SamplingParams(max_tokens=9, temperature=float(self.sampled))
            admit = [SlotInit(slot, self._step, [1], 1, 0, [], params, []) for slot in range(self.batch)]
        self._new = False
        drafting = Drafting(k, k + look, look)
        plan = StepPlan(step=self._step, admit=admit, decode=list(range(self.batch)), drafting=drafting)
        lengths.planned(plan)
        verify = k if not self.eager or any(self._left) else 0
        drafts = self._draft(k + look)
        slots = []
        for slot in range(self.batch):
            left = self._left[slot][:k]
            right = left.index(WRONG) if WRONG in left else len(left)
            told = drafts[slot] if look else []
            slots.append(SlotResult(slot, 1, [RIGHT] * (right + 1), None, drafted=len(left), accepted=right, drafts=told))
        rows = sum(slot.drafted for slot in slots) / self.batch if self.experts else verify
        true = self.cost(self.batch, rows, k + look)
        seconds = self._measured(true, (verify, k + look))
        lengths.collected(plan, StepResult(step=self._step, slots=slots, seconds=seconds, verified=verify))
        self.time += true
        self.tokens += sum(len(slot.tokens) for slot in slots) / self.batch
        self.chosen.append(k)
        self.looks += look
        self._step, self._left = self._step + 1, drafts

    def _draft(self, count: int) -> list[list[int]]:
        if not count:
            return [[]] * self.batch
        return [self._drafts_of_one(count) if self.rng.random() < self.offered else [] for _ in range(self.batch)]

    def _drafts_of_one(self, count: int) -> list[int]:
        right = 0
        while right < count and self.rng.random() < self.acceptance:
            right += 1
        return [RIGHT] * right + [WRONG] * (count - right)

    def _measured(self, seconds: float, program: tuple[int, int]) -> float:
        if not self.noise:
            return seconds
        self.ran[program] += 1
        first, interrupted = self.ran[program] <= (1 if self.eager else 2), self.rng.random() < 0.01
        return seconds * self.rng.gauss(1, 0.02) * (5 if first else 8 if interrupted else 1)
