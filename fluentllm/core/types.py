"""The vocabulary: what the front end, the engine and the executor say to each other, as msgspec Structs.

Torch-free. Everything here can cross a process border as msgpack. Token ids, slots and pages are plain ints; times are
seconds on the monotonic clock; sizes are bytes.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct, field

FinishReason = Literal["stop", "length", "abort", "error"]


# --------------------------------------------------------------------------------------------------------------- requests
class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request draws its tokens. Validated by the front end; the step program trusts it."""

    max_tokens: int
    """Budget of new tokens, ≥ 1."""
    min_tokens: int = 0
    """No stop id counts before this many new tokens."""
    temperature: float = 1.0
    """0 means argmax."""
    top_k: int = 0
    """0 means off."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """Key of the noise, together with the position. The front end draws one where the user gave none."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id → added to its logit. At most `MAX_LOGIT_BIAS` entries."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop ids of the request's own; the model's end-of-sequence ids are added by the engine unless `ignore_eos`."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. n ≥ 0: the chosen token's, and the n most likely, n ≤ `MAX_LOGPROBS`."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (the first has none); such a request does not read the prefix cache."""


MAX_LOGIT_BIAS = 512
MAX_LOGPROBS = 20
MAX_STOP_IDS = 32


class Request(Struct, frozen=True, kw_only=True):
    """One sequence to continue. `n` choices of one HTTP request are n of these."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    """Smaller runs first."""


class TokenLogprob(Struct, frozen=True, array_like=True):
    """Log-probability of one token, from the processed-before-sampling (raw) distribution, natural logarithm."""

    token: int
    logprob: float
    rank: int
    """1 is the most likely."""
    top: list[tuple[int, float]]
    """(token, logprob), most likely first."""


class RequestOutput(Struct, kw_only=True, omit_defaults=True):
    """What one step brought one request. `tokens` excludes nothing: a stop id that ended it is the last of them."""

    id: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    """One for each of `tokens`, if asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """Once, with the first output, if asked for."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop id, where one ended the request."""
    drafted: int = 0
    """Drafts that this step verified for the request."""
    accepted: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache; told once, with the first output."""


# --------------------------------------------------------------------------------------------------------------- one step
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


class Drafting(Struct, frozen=True):
    """How many drafts a step verifies, and how many it leaves for the next to verify."""

    verify: int = 0
    draft: int = 0


class StepPlan(Struct, frozen=True, kw_only=True):
    """One step, in the order the executor applies it: admissions, page grants, the prefill program, the decode program."""

    step: int
    admit: list[SlotInit] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
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


class StepResult(Struct, kw_only=True):
    step: int
    slots: list[SlotResult]
    """Slots of last prefill chunks (and of chunks with prompt logprobs), then of `decode`, in the plan's order."""
    seconds: float
    """From the program's start to its end on the device."""
    drafting_error: str | None = None
    """Why the proposer was switched off, in this step or before."""


# -------------------------------------------------------------------------------------------------------- model and memory
class KVSpec(Struct, frozen=True, kw_only=True):
    """Shape of one token's KV, and how many layers keep one."""

    kind: Literal["gqa", "mla"]
    layers: int
    heads: int = 0
    """gqa: KV heads."""
    head_dim: int = 0
    v_head_dim: int = 0
    latent_dim: int = 0
    """mla: width of the compressed latent."""
    rope_dim: int = 0
    """mla: width of the shared rotary key."""

    def values_per_token(self) -> int:
        """Values that one token keeps over all layers."""
        if self.kind == "mla":
            return self.layers * (self.latent_dim + self.rope_dim)
        return self.layers * self.heads * (self.head_dim + self.v_head_dim)


class ModelSpec(Struct, frozen=True, kw_only=True):
    """What the engine must know of a model without looking inside."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    max_position: int
    """Longest context the checkpoint allows, prompt and answer together."""
    kv: KVSpec
    """Of the target; `kv.layers` does not count the draft layers."""
    eos_token_ids: tuple[int, ...] = ()
    draft_kv_layers: int = 0
    """KV layers, of the same shape, that the model's own draft layers (MTP) use: numbers kv.layers and up. A pool for
    speculation has kv.layers + draft_kv_layers layers."""


class SpeculativeInfo(Struct, frozen=True, kw_only=True):
    """Who drafts, and how much."""

    method: str
    k: int | Literal["auto"]
    max_k: int
    synthetic_acceptance: float | None = None
    """Drafts are accepted at random, for benchmarks: the answers mean nothing."""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What the engine tells the front end once it can serve."""

    name: str
    spec: ModelSpec
    max_model_len: int
    device: str
    dtype: str
    """Of activations."""
    memory: dict[str, int]
    """Name → bytes: weights, kv_pool, slots …"""
    kv_tokens: int
    """Tokens that the KV pool holds."""
    page_size: int
    slots: int
    weight_precision: str = ""
    """What matrix weights are kept as, as `model.weight_precision` names it; empty if the engine does not say."""
    speculative: SpeculativeInfo | None = None
    """None where nothing drafts."""


class KVEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change of the prefix cache, for KV-aware routers: pages entered or left the radix tree."""

    kind: Literal["stored", "removed", "cleared"]
    blocks: list[int] = field(default_factory=list)
    """Chained hashes of the pages, unsigned 64-bit."""
    parent: int | None = None
    """Hash of the page before the first of `blocks`; None at the start of a sequence."""
    tokens: list[int] = field(default_factory=list)
    page_size: int = 0


class SpeculativeStats(Struct, frozen=True, kw_only=True):
    """Drafts since the start, and how far they were right."""

    info: SpeculativeInfo
    verifications: int = 0
    """Times that a sequence's drafts were verified; each brought its accepted drafts and one token of the target's own."""
    drafted: list[int] = field(default_factory=list)
    """For each position, first to last: how often it held a draft."""
    accepted: list[int] = field(default_factory=list)
    """And how often that and all before it were right."""
    error: str | None = None
    """Why the proposer was switched off."""

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a verification, the target's own included."""
        return 1 + sum(self.accepted) / self.verifications if self.verifications else 1.0


class PluginCalls(Struct, frozen=True, kw_only=True):
    """What one plugin has cost at one place since the process started. Times in seconds."""

    plugin: str
    hook: str
    """A hook's name, `import`, or the path of a route (until its answer begins)."""
    calls: int
    failures: int
    seconds: float
    """Of all calls together."""
    longest: float
    enabled: bool = True
    """False: an observer that failed too often, and is called no more."""


class EngineStats(Struct, frozen=True, kw_only=True):
    waiting: int
    running: int
    pages_total: int
    pages_free: int
    pages_cached: int
    """Held by the radix tree (some also by requests)."""
    pages_leased: int
    """Held by requests, steps in flight or remote writers."""
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    plugins: list[PluginCalls] = field(default_factory=list)
    """Of the engine's process."""
    speculative: SpeculativeStats | None = None
    """None where nothing drafts."""


# ------------------------------------------------------------------------------------- frames between front end and engine
class Generate(Struct, frozen=True, tag="generate"):
    request: Request


class Abort(Struct, frozen=True, tag="abort", omit_defaults=True):
    """No more of these is wanted."""

    ids: list[str]
    reason: Literal["abort", "stop"] = "abort"
    """stop: they are complete, because their text came to a stop string, which only the front end sees."""


class ControlCall(Struct, frozen=True, tag="control"):
    """Ask the engine for something outside the token stream; answered by a `ControlReply` with the same id."""

    id: int
    method: Literal["stats", "clear_cache"]


class Ready(Struct, frozen=True, tag="ready"):
    """First frame from the engine."""

    info: ModelInfo


class Outputs(Struct, frozen=True, tag="outputs"):
    """Everything one step brought to this connection's requests."""

    outputs: list[RequestOutput]


class Refused(Struct, frozen=True, tag="refused"):
    """A request that did not enter, or broke later."""

    id: str
    code: str
    status: int
    message: str
    param: str | None = None


class ControlReply(Struct, frozen=True, tag="control_reply"):
    id: int
    stats: EngineStats | None = None


ToEngine = Generate | Abort | ControlCall
FromEngine = Ready | Outputs | Refused | ControlReply


def encode(message: Struct) -> bytes:
    return msgspec.msgpack.encode(message)
