"""What attention backends on a GPU plan of a prefill pass that is captured, before its program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.buckets import captured_pages
from ..core.protocols import PassPlan

if TYPE_CHECKING:
    from ..core.batch import Batch
    from ..kernels.triton.gqa_prefill_plan import PaddedPlans


def plan_pass(plans: PaddedPlans, batch: Batch, *, expands: bool) -> PassPlan | None:
    """`PassPlan.plan` is (`PaddedPlan`, pages): where the backend `expands` latents, so many pages of them, else 0. None: they
    are too many to be captured."""
    assert batch.query_lengths is not None
    assert batch.kv_lengths_host is not None
    pages = captured_pages(batch.kv_lengths_host, batch.page_size) if expands else 0
    if pages is None:
        return None
    tiles = plans.plan(batch.query_lengths, batch.kv_lengths_host, batch.tokens.shape[0])
    return PassPlan((tiles.key, pages), (tiles, pages))
