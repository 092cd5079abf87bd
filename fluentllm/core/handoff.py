"""Handing requests over between engines, as the core sees it: a prompt whose KV comes from elsewhere, a prompt whose KV is
wanted elsewhere.

A plugin (`fluent_handoffs`) makes the `Handoffs` object that the engine calls; it knows peers, control messages and transports.
The engine knows sequences, pages and steps, and offers `Host`. Torch-free; everything runs in the engine's loop except
`PassWatcher`, whose calls come from the launch thread.

    prefill: adopt … planned (a step will compute a chunk) … watcher.layer … drew (first token); its lease holds the pages
    decode:  adopt → Host.expect (pages) … Host.arrived (enters a slot without a prefill), or Host.compute (prefill here)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .errors import FluentError
    from .kv.cache import KVCache
    from .kv.pages import Lease
    from .kv.pool import KVPool
    from .sequence import Sequence
    from .settings import Settings
    from .transport import KVTransport, TransportContext
    from .types import HandoffDoor, HandoffReport, Request, SlotResult, StepPlan, TokenLogprob

Role = Literal["prefill", "decode", "both"]


class PassWatcher(Protocol):
    """Follows prefill passes layer by layer. Called on the launch thread, in the order of the launches; must return at once.
    On a GPU "written" means enqueued on the current stream: record an event there, never wait."""

    def begin(self, plan: StepPlan) -> None:
        """The plan's prefill program starts."""
        ...

    def layer(self, layer: int) -> None:
        """The KV of all rows of the pass is written in `layer`, 0 … kv.layers - 1, in order."""
        ...

    def end(self) -> None:
        """And in the draft layers, with what the proposer keeps for each page; the pass is over."""
        ...


class Host(Protocol):
    """What the engine does for the handoffs."""

    kv: KVCache

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot or for pages; who brings more KV in should wait behind them."""
        ...

    def expect(self, sequence: Sequence, label: str) -> Lease | None:
        """Pages for the sequence's prompt and its first steps, after what the radix tree has of it. Returns a lease of kind
        `remote`, the writer's, over the pages from `sequence.published` on that the prompt's KV goes to (`sequence.pages` has
        them in order); None, and nothing changed, if pages are short. `sequence.cached_tokens` is what the tree had.

        The caller ends the lease: released when the writer is drained, else quarantined."""
        ...

    def give_up(self, sequence: Sequence) -> None:
        """Take back `expect`, but for the writer's lease."""
        ...

    def arrived(self, sequence: Sequence, token: int, logprob: TokenLogprob | None, report: HandoffReport) -> None:
        """The KV of the whole prompt is in its pages, and this is its first token: deliver it, and decode."""
        ...

    def compute(self, sequence: Sequence) -> None:
        """Prefill it here after all. It must hold no pages."""
        ...

    def submit(self, request: Request) -> None:
        """A request that came from a peer instead of a client; nobody hears its tokens but the handoffs. Raises
        `FluentError`."""
        ...

    def withdraw(self, request_id: str) -> None:
        """Abort what was submitted so; ignored where it is over."""
        ...

    def refuse(self, sequence: Sequence, error: FluentError) -> None:
        """End it with an error. It must hold no pages."""
        ...

    def wake(self) -> None:
        """Let the loop turn once more."""
        ...

    def fail(self, error: Exception) -> None:
        """End the engine with this error: it cannot be helped but by a restart."""
        ...


class Handoffs(Protocol):
    """One engine's handoffs, both ways. Methods may not block."""

    watcher: PassWatcher | None
    """None where nothing is sent."""

    @property
    def open(self) -> int:
        """Handoffs that are not over, quarantined pages of past ones included: while there are any, the engine is not idle."""
        ...

    @property
    def door(self) -> HandoffDoor:
        """Where peers reach us."""
        ...

    def start(self, host: Host) -> None:
        """The engine's loop runs. Raises `FluentError` for what cannot work."""
        ...

    def prepare(self, request: Request) -> Request:
        """A request with `handoff` set, before a sequence is made of it: what of it is to be computed here. Raises
        `FluentError` where it cannot be handed over."""
        ...

    def adopt(self, sequence: Sequence) -> bool:
        """It was submitted. True: all or some of its KV comes from elsewhere, and `Host.arrived`, `compute` or `refuse`
        follows; else the scheduler has it."""
        ...

    def abort(self, sequence: Sequence) -> bool:
        """Its client left. True if it was in our hands, and not in the scheduler's; its pages are given back then."""
        ...

    def planned(self, plan: StepPlan, sequences: SequenceOf[Sequence]) -> None:
        """The plan is about to be launched; `sequences` are those of `plan.prefill`, in order."""
        ...

    def drew(self, sequence: Sequence, result: SlotResult) -> HandoffReport | None:
        """A step brought tokens to a sequence with a handoff; its pages are still its own. What to tell its client."""
        ...

    def turn(self) -> None:
        """Once a turn of the engine's loop: pages may have become free."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Counters since the start, and what is open now."""
        ...

    def close(self) -> None:
        """The engine ends. Blocks, up to seconds."""
        ...


@dataclass(frozen=True, slots=True)
class HandoffContext:
    """What `Handoffs` are made from."""

    settings: Settings
    role: Role
    model: str
    """Fingerprint of config and weights: engines with different ones cannot exchange KV."""
    pool: KVPool
    draft_layers: int
    """How many of the pool's layers are the proposer's, the last ones."""
    make_transport: Callable[[TransportContext], KVTransport]
    page_states: SequenceOf[Tensor] = field(default_factory=tuple)
    """[pages + 1, …], contiguous: what the proposer keeps for each page, and wants where the page goes."""
    speculative: str = "none"
    """Who drafts; page states mean nothing to another."""
    tp_size: int = 1
    tp_rank: int = 0
    kv_heads: int | None = None
    """KV heads of the whole model, where ranks share them; None: the ranks' own, added up."""


KV_WRITERS = ("gqa", "gqa_from_product", "mla", "mla_append")
"""Methods of attention backends that write a layer's KV; the first argument is the layer."""


def watched(backend: Any, watcher: PassWatcher) -> Any:
    """A twin of an attention backend, on the same pool, that tells `watcher` when a layer's KV is written. For the target's
    prefill passes; proposers and decodes keep the backend itself."""
    twin = copy(backend)
    for name in KV_WRITERS:
        method = getattr(backend, name, None)
        if method is not None:
            own = getattr(type(backend), name, None)  # None where a wrapper hands on what it does not define
            setattr(twin, name, _told(partial(own, twin) if own is not None else method, watcher))
    return twin


def _told(method: Callable[..., Any], watcher: PassWatcher) -> Callable[..., Any]:
    def call(layer: int, *operands: Any, **options: Any) -> Any:
        result = method(layer, *operands, **options)
        watcher.layer(layer)
        return result

    return call
