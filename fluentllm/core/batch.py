"""One forward pass as the layers see it: which rows, of which sequences, where their KV lies.

Built by the step programs from the slot tables, read by models and attention backends. Torch-free to import (the
annotations alone name tensors), so that `layers` may use it. Tensors are on the device; what the host knows is marked so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Batch:
    """N sequences with T query rows in all; the rows of a sequence are consecutive and in order of position.

    A row attends to the keys of its own sequence at positions ≤ its own. Its own KV is written first, by the attention
    backend, at `kv_rows`.
    """

    tokens: Tensor
    """[T] int64, input token of each row."""
    positions: Tensor
    """[T] int64, its position in its sequence."""
    sequences: Tensor
    """[T] int64, its sequence, 0 … N-1."""
    slots: Tensor
    """[N] int64, the sequences' rows in the slot tables."""
    query_start: Tensor
    """[N + 1] int32, first row of each sequence."""
    kv_lengths: Tensor
    """[N] int32, keys of each sequence after this pass has written its own; at the positions of inert rows lies what lay there
    before, which is finite, and no other row sees it."""
    page_table: Tensor
    """[N, P] int32, pages of each sequence; entries past its length are arbitrary valid pages."""
    kv_rows: Tensor
    """[T] int64, where each row's KV goes in the pool seen as [pages × page_size] token rows. Rows that nobody needs (padding,
    those of finished slots, of drafts that nobody left) are inert: they point at the scratch page 0, which no sequence owns.
    What is computed of them need only be finite."""
    history: Tensor
    """[S, L] int32, the token history of all slots (drafts of this pass included), for n-gram embeddings:
    the token of sequence i at position p is `history[slots[i], p]`."""
    page_size: int
    query_length: int | None
    """Host side. q if every sequence has exactly q rows (decode, verification), else None."""
    query_lengths: tuple[int, ...] | None
    """Host side. Rows of each sequence, known for prefill only."""
    kv_lengths_host: tuple[int, ...] | None = None
    """Host side. `kv_lengths`, known for prefill only."""
    first_key: int = 0
    """Host side. Keys at positions before it do not exist for this pass's layers: 1 for draft layers that have no pair for a
    sequence's first token (`step.draft_rows`). What a row before it computes means nothing, but is finite."""
    layer_inputs: list[Tensor] = field(default_factory=list)
    """What enters the trunk's layers that `Model.tap` named, [T, hidden] each, in their order: filled by the pass, for
    proposers."""
    plan: Any = None
    """What the attention backend has planned for this pass before its program (`core.protocols.PlannedPrefill`); None: `begin`
    plans. With a plan the last rows may be padding: of the sequence behind those of `query_lengths`, on the scratch page. What
    is computed of them is finite and means nothing."""
    features: int = 0
    """Host side. Bits of `Feature`: what the pass's requests need, so that proposers compute no more than that either."""

    def refuse_first_key(self) -> None:
        """For MLA by kernels, which see all keys: of the built-in draft layers only those lack a first key that have grouped
        heads. Raises `PluginError`: a proposer's layers ask for more."""
        if self.first_key:
            raise PluginError(
                f"A proposer's MLA layers have no key at the first {self.first_key} positions (first_key); MLA's kernels see "
                "all keys of a sequence, from its first on.",
                fix="Give the layers grouped heads (DraftMemory.kv), or a first_key of 0.",
            )
