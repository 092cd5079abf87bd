"""One step: what the scheduler plans, what the device brings."""

from __future__ import annotations

from msgspec import Struct, field

from .requests import FinishReason, SamplingParams, TokenLogprob


class SlotInit(Struct, frozen=True, array_like=True):
    """Fill a slot's row in every table: a request enters the device, or comes back after a preemption."""

    slot: int
    generation: int
    tokens: list[int]
    """The history so far: the prompt, and what was generated before a preemption."""
    prompt_length: int
    """How many of `tokens` are prompt; penalties count the rest as output."""
    cached: int
    """Leading tokens whose KV is in `pages` already."""
    pages: list[int]
    params: SamplingParams
    stop_ids: list[int]
    grammar_state: int = 0
    """Row of the grammar table that it stands in; filled by the engine."""


class PageGrant(Struct, frozen=True, array_like=True):
    """Append `pages` to a slot's page table from entry `first` on."""

    slot: int
    first: int
    pages: list[int]


class PrefillChunk(Struct, frozen=True, array_like=True):
    """Compute `count` history tokens of a slot from position `start` on. After the last chunk a token is sampled."""

    slot: int
    start: int
    count: int
    last: bool
    prompt_logprobs: int | None = None


class GrammarLoad(Struct, frozen=True, array_like=True):
    """Write a grammar's table to `states` rows of the device's from `first` on (`core.grammars`)."""

    first: int
    states: int
    next: bytes


class TokenMasks(Struct, frozen=True, array_like=True):
    """What a slot may draw at its next `rows` positions (`core.host_grammars`)."""

    slot: int
    rows: int
    bits: bytes
    """[rows, words] int32 in the machine's byte order; token t is bit t % 32 of word t // 32."""


class Drafting(Struct, frozen=True):
    """How many drafts a step verifies, and how many it leaves."""

    verify: int = 0
    draft: int = 0
    look: bool = False
    """It leaves one draft more than it verifies: what is left comes back (`SlotResult.drafts`), for the host to compare with
    the tokens that come instead."""


class StepPlan(Struct, frozen=True, kw_only=True):
    """One step, in the order the executor applies it: admissions, page grants, the prefill program, first drafts of prompts
    that were computed elsewhere, the decode program."""

    step: int
    admit: list[SlotInit] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    grammars: list[GrammarLoad] = field(default_factory=list)
    """Applied before the admissions; filled by the engine."""
    masks: list[TokenMasks] = field(default_factory=list)
    """Applied behind the admissions; filled by the engine. What is drafted in these slots comes back: `SlotResult.drafts`."""
    prefill: list[PrefillChunk] = field(default_factory=list)
    resume: list[PrefillChunk] = field(default_factory=list)
    """Slots that enter with their prompts' KV written elsewhere: the last position of each prompt. They are in `decode` too."""
    decode: list[int] = field(default_factory=list)
    """Slots that decode."""
    drafting: Drafting = Drafting()
    features: int = 0
    """Bits of `Feature`: what any request of the step needs beyond argmax, so that the rest is not computed."""


class Feature:
    """Bits of `StepPlan.features`."""

    SAMPLING = 1
    """Some temperature is above 0."""
    PENALTIES = 2
    BIAS = 4
    LOGPROBS = 8
    FILTER = 16
    """Some top-k, top-p or min-p is on."""
    MIN_TOKENS = 32
    GRAMMAR = 64
    """Some grammar is a device table."""
    TOKEN_MASKS = 128
    """Some grammar's matcher is on the host."""


class SlotResult(Struct, array_like=True):
    """What a step brought one slot; a slot that was already finished brings no tokens."""

    slot: int
    generation: int
    tokens: list[int]
    finished: FinishReason | None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """For a prefill chunk: one for each computed token but the sequence's first."""
    drafted: int = 0
    """Drafts that were verified."""
    accepted: int = 0
    """Of these, right and all before them right."""
    drafts: list[int] = field(default_factory=list)
    """Left for the slot's next step; told of slots in `StepPlan.masks`, and of all with `Drafting.look`."""


class StepResult(Struct, kw_only=True):
    step: int
    slots: list[SlotResult]
    """Slots of last prefill chunks (and of chunks with prompt logprobs), then of `decode`, in the plan's order."""
    seconds: float
    """From the program's start to its end on the device."""
    launching: float = 0.0
    """Seconds that the host took to launch it; 0 where the host computes it."""
    behind: float = 0.0
    """Seconds from then until the device had done it."""
    verified: int = 0
    """Drafts of each slot that the decode program computed: `Drafting.verify`, or none where no slot had any and the program
    was not captured."""
    drafting_error: str | None = None
    """Why the proposer was switched off, in this step or before."""
