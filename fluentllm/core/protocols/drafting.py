"""Proposers of drafts, and what they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..batch import Batch
    from ..settings import Settings
    from ..slots import SlotTables
    from ..types import KVSpec, ModelSpec
    from .attention import AttentionBackend
    from .models import BuildContext, Checkpoint, Model, WeightSlot


@dataclass(frozen=True, slots=True)
class DraftTarget:
    """What a proposer's memory depends on."""

    settings: Settings
    spec: ModelSpec
    """Of the target."""
    value_bytes: int
    """Bytes of one value of a hidden state."""
    path: Path | None = None
    """The target's folder or file; None where that has been looked at before."""


@dataclass(frozen=True, slots=True)
class DraftMemory:
    """What a proposer keeps for the tokens of the KV pool; counted when the pool is planned. Its pages are the target's: one
    lease holds both, under one number."""

    kv_layers: int = 0
    """Layers of the pool behind the target's, of the same shape: passed to `AttentionBackend` as layers kv.layers and up."""
    kv: KVSpec | None = None
    """Instead: layers of another shape, in a pool of their own with an attention backend of its own, as layers 0 and up."""
    bytes_per_page: int = 0
    """Tensors of its own, for each page."""


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a proposer loads its draft model with."""

    settings: Settings
    target: Model
    build: BuildContext
    """As the target was built."""
    open: Callable[[Path, Iterable[WeightSlot]], Checkpoint]
    """Open a folder or file with the reader that fits it; random weights for these slots where the target has such too."""


@dataclass(frozen=True, slots=True)
class ProposerContext:
    """What a proposer is made from."""

    settings: Settings
    model: Model
    tables: SlotTables
    attention: AttentionBackend
    """Of the proposer's own KV layers: the target's, or one for `DraftMemory.kv`."""
    max_drafts: int
    pages: int = 0
    """Usable pages of the KV pool; their numbers are 1 … pages, and 0 is scratch."""
    dtype: str = "float32"
    """Of hidden states."""
    draft: Any = None
    """What the factory's `load` gave."""


@dataclass(frozen=True, slots=True)
class DraftReads:
    """What of weights and KV must be read to make drafts, for who compares times with that (`fluent bench latency`). Modules
    are those of `layers`, with all below them; a tensor that is indexed counts by its rows."""

    once: tuple[Any, ...] = ()
    """Modules that a step reads once, for the rows that it verifies."""
    each: tuple[Any, ...] = ()
    """Modules that it reads again for each draft of a sequence, the head included."""
    kv: KVSpec | None = None
    """Of a sequence's KV, what it reads for each draft; None: nothing."""


class ProposerFactory(Protocol):
    """What `fluent_proposers` registers: a callable. It is asked `supports(model spec)` before anything is loaded. `memory` and
    `load` may be missing: then it keeps nothing in the pool, and has no weights of its own; `speculative.model` is refused."""

    memory: Callable[[DraftTarget], DraftMemory]
    """What it keeps; asked before anything is loaded, and again. Raises `ConfigError` for settings that cannot work with this
    target."""
    load: Callable[[DraftContext], Any]
    """Load a draft model, after the target and before the pool is planned; what it returns has `nbytes()`."""

    def __call__(self, context: ProposerContext) -> Proposer: ...


class Proposer(Protocol):
    """Drafts tokens that the next step verifies. Part of the step program: device tensors in and out, and no waiting for the
    device. A draft is right if it is the token that the target draws itself, so nothing here can change an answer."""

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Called after every pass of the target, once its tokens are in the slot tables.

        batch: the pass, prefill or decode; hidden [T, hidden]: of its rows, after the final norm; slots [B] int64: those that
        got tokens (none after a prompt's chunk but the last); count ≥ 0: drafts wanted. Keeps the proposer's own state up to
        date for all rows, and returns drafts [B, count] int64, valid token ids, and how many of each row are worth verifying,
        [B] int64 (with count 0 nobody looks at these). A row at position p of slot s became part of the history if
        p < tables.length[s], unless it is inert: then it lies on page 0 (`batch.kv_rows`). One that raises, or returns other
        shapes, types or layouts, is switched off for good.
        """
        ...


class CountedProposer(Proposer, Protocol):
    """A proposer that tells what it reads. Of others it is unknown how fast a step with them could be at best."""

    @property
    def reads(self) -> DraftReads: ...


class MovableProposer(Proposer, Protocol):
    """A proposer that can go on with a prompt that another engine's proposer of the same kind has seen. Without this the first
    step after such a prompt has no drafts, and a proposer with a state of its own must do without the prompt's."""

    @property
    def page_states(self) -> SequenceOf[Tensor]:
        """Tensors [pages + 1, …], contiguous, of what it keeps for each page besides its KV layers: they are sent along."""
        ...

    def resume(self, batch: Batch, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`draft` after a prompt that was computed elsewhere. batch: one row a slot, the last position of its prompt, whose KV
        (draft layers included) and page states are in place; the first token is in the slot tables."""
        ...
