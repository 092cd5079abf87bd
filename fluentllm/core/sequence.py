"""The host's view of one request on its way through the engine: what is known of it, and how long it may be by now.

The device's own state is in the slot tables; this is what the scheduler plans with. With steps in flight the host lags
behind the device, so two lengths are kept: `tokens`, what has been collected, and `planned`, the longest that it can be
once every launched step has run.
"""

from __future__ import annotations

from enum import Enum

from .types import Request


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Sequence:
    """A request and its progress. Owned by the engine's loop; not shared between threads."""

    __slots__ = (
        "cached_tokens",
        "finish_reason",
        "generation",
        "last_step",
        "pages",
        "phase",
        "planned",
        "prefilled",
        "prompt_length",
        "published",
        "request",
        "slot",
        "started",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, stop_ids: list[int]) -> None:
        self.request = request
        self.stop_ids = stop_ids
        self.tokens = list(request.prompt)
        """Prompt and collected new tokens."""
        self.prompt_length = len(request.prompt)
        self.phase = Phase.WAITING
        self.finish_reason: str | None = None
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
        self.planned = 0
        """Upper bound of tokens with KV once every launched step has run."""
        self.last_step = -1
        """Last launched step that names it."""
        self.started = False
        """A token has been sent to the client."""

    @property
    def budget_end(self) -> int:
        """Most tokens, prompt included, that it may ever have."""
        return self.prompt_length + self.request.params.max_tokens

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length
