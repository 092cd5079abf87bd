"""What observers are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A request's life, for observers. `scheduled` comes again when a preempted request comes back."""

    kind: Literal["queued", "scheduled", "first_token", "finished"]
    id: str
    time: float
    """Seconds, monotonic clock."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """finished: reason (`FinishReason`; a stop string's is `stop`; `refused`: it never ran, by a fault of its own, such as a
    grammar that is none), prompt_tokens, cached_tokens, generated_tokens."""
