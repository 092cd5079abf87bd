"""What is asked, and what comes back."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

FinishReason = Literal["stop", "length", "abort", "error"]


class GrammarSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the text must be: a grammar of a kind that some plugin knows (`fluent_grammars`)."""

    kind: str
    source: str


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
    grammar: GrammarSpec | None = None


MAX_LOGIT_BIAS = 512
MAX_LOGPROBS = 20
MAX_STOP_IDS = 32


class Handoff(Struct, frozen=True, kw_only=True):
    """A request whose prefill and decode are on different engines: each of the two gets one with the same id."""

    id: str
    host: str = ""
    port: int = 0
    """Where the prefill engine takes control connections; empty, 0: it is this one."""
    concurrent: bool = False
    """Both engines were given it at once, so that decode asks for the prompt while prefill may not have computed it yet."""


class HandoffReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a handoff has to tell, once, with a request's first output."""

    id: str
    host: str = ""
    port: int = 0
    """Prefill: where the prompt's KV waits for a decode engine."""
    received_bytes: int = 0
    """Decode: written by the prefill engine for this request, repeats not counted."""
    saved_bytes: int = 0
    """Decode: not sent, since this engine had it cached."""
    attempts: int = 0


class Request(Struct, frozen=True, kw_only=True):
    """One sequence to continue. `n` choices of one HTTP request are n of these."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    """Smaller runs first."""
    handoff: Handoff | None = None
    """Set where the prompt is computed on one engine and continued on another."""


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
    handoff: HandoffReport | None = None
    """Once, with the first output, of a request that was handed over."""
