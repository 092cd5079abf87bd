"""First drafts of prompts that another engine has computed: what a prefill would have left in their slots."""

from __future__ import annotations

from functools import partial

from ..core.types import PrefillChunk
from .decode import Target, propose
from .prefill import prefill_batch


def resume(chunks: list[PrefillChunk], drafts: int, features: int, target: Target) -> None:
    """`chunks` are the last positions of the prompts. Their KV and first tokens are in place; leaves `drafts` drafts in each
    slot, to be verified by the decode program of the same step, and brings the proposer's own state up to the first token."""
    call = getattr(target.proposer, "resume", None)
    if call is None:
        return
    batch = prefill_batch(chunks, target.tables)
    batch.features = features
    propose(partial(call, batch), batch.slots, drafts, features, target)
