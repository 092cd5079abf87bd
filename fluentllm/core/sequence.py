"""The host's view of one request on its way through the engine: what is known of it, and how long it may be by now.

The device's own state is in the slot tables; this is what the scheduler plans with. With steps in flight the host lags
behind the device, so two lengths are kept: `len(tokens)`, what has been collected, and `longest`, what it can be at most
once every launched step has run.
"""

from __future__ import annotations

from enum import Enum

from .types import Feature, FinishReason, Request, SamplingParams


class Phase(Enum):
    WAITING = "waiting"
    """For a slot and pages, or for KV from elsewhere."""
    PREFILL = "prefill"
    DECODE = "decode"


def features_of(params: SamplingParams) -> int:
    """Bits of `Feature` that a request needs."""
    features = 0
    if params.temperature > 0:
        features |= Feature.SAMPLING
        if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
            features |= Feature.FILTER
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
        features |= Feature.PENALTIES
    if params.logit_bias:
        features |= Feature.BIAS
    if params.logprobs is not None:
        features |= Feature.LOGPROBS
    if params.grammar is not None:
        features |= Feature.GRAMMAR
    if params.min_tokens > 0:
        features |= Feature.MIN_TOKENS
    return features


class Sequence:
    """A request and its progress. Owned by the engine's loop; not shared between threads."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "features",
        "finish_reason",
        "generation",
        "in_flight",
        "last_step",
        "launched",
        "on_host",
        "pages",
        "phase",
        "prefilled",
        "prompt_length",
        "published",
        "request",
        "slot",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, stop_ids: list[int], arrival: int = 0) -> None:
        self.request = request
        self.arrival = arrival
        """Counts requests as they come; a preempted one keeps its number and so its place."""
        self.features = features_of(request.params)
        self.stop_ids = stop_ids
        self.tokens = list(request.prompt)
        """Prompt and collected new tokens."""
        self.prompt_length = len(request.prompt)
        self.phase = Phase.WAITING
        """The end of a request does not change it: what of its KV is written depends on where it was then."""
        self.finish_reason: FinishReason | None = None
        self.slot: int | None = None
        self.generation = 0
        """Counts admissions, so that results of an earlier stay in a slot are told apart."""
        self.pages: list[int] = []
        """Mirror of the slot's page table."""
        self.published = 0
        """Leading pages that the radix tree knows."""
        self.cached_tokens = 0
        """Of the prompt, at the first admission."""
        self.prefilled = 0
        """Tokens whose KV is written or will be by a launched prefill (cached ones included)."""
        self.in_flight = 0
        """Most tokens that launched but not collected steps can bring."""
        self.launched = 0
        """How many such steps there are; each brings at least one token, unless the sequence has ended."""
        self.last_step = -1
        """Last launched step that names it."""
        self.on_host = False
        """Its grammar's matcher is on the host (`core.host_grammars`): a step must be collected before the next is planned."""

    @property
    def budget_end(self) -> int:
        """Most tokens, prompt included, that it may ever have."""
        return self.prompt_length + self.request.params.max_tokens

    @property
    def longest(self) -> int:
        """Upper bound of the tokens it has once every launched step has run."""
        return min(len(self.tokens) + self.in_flight, self.budget_end)

    @property
    def can_decode(self) -> bool:
        """Whether another step could bring it a token, for all that is known."""
        if self.finish_reason is not None or (self.on_host and self.launched):
            return False
        return self.phase is Phase.DECODE and len(self.tokens) + self.launched < self.budget_end

    def launch(self, step: int, tokens: int) -> None:
        """A step that names it was planned, and brings at most `tokens` tokens (0 for a prompt's chunk but the last)."""
        self.last_step = step
        self.in_flight += tokens
        self.launched += tokens > 0

    def collect(self, tokens: int) -> None:
        """The same step was collected."""
        self.in_flight -= tokens
        self.launched -= tokens > 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length
