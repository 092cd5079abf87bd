"""What a step runs on: slot tables, KV pools, attention backends, proposer, programs, for any size of the pool.

Made twice on a GPU: with next to no pool, to measure what the largest steps take beside it, and with the pool that fits then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs

from ..core.kv.pool import KVPool
from ..core.protocols import PHASES, AttentionSpec, DraftMemory, ProposerContext
from ..core.slots import SlotTables
from ..step.programs import StepPrograms
from .attention import attention_for, candidates
from .choices import choose_kv_dtype, choose_page_size, name_of, synthetic_share

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.plugins import PluginManager
    from ..core.protocols import AttentionBackend, Proposer
    from ..core.settings import Settings
    from ..core.types import KVSpec
    from .loading import LoadedModel
    from .proposers import ChosenProposer


@dataclass(frozen=True, slots=True)
class Sizes:
    slots: int
    context: int
    """Tokens of the longest sequence."""
    drafts: int
    grammar_states: int
    token_masks: bool = False
    """Of matchers on the host."""


@dataclass(frozen=True, slots=True)
class Parts:
    """For one size of the pool."""

    programs: StepPrograms
    tables: SlotTables
    pool: KVPool
    draft_pool: KVPool | None
    """Of a proposer whose KV has another shape."""
    page_states: tuple[Tensor, ...] = ()
    """What the proposer keeps for each page besides its KV."""


def page_bytes(kv: KVSpec, drafts: DraftMemory, page_size: int, dtype: torch.dtype) -> int:
    """Of one page, over all pools and what a proposer keeps."""
    pools = [structs.replace(kv, layers=kv.layers + drafts.kv_layers), *([drafts.kv] if drafts.kv is not None else [])]
    return drafts.bytes_per_page + sum(KVPool.bytes_per_page(pool, page_size, dtype) for pool in pools)


class PartsMaker:
    """`make(pages)`, and to try what fits `make(pages, slots)`."""

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedModel,
        plugins: PluginManager,
        sizes: Sizes,
        proposer: ChosenProposer | None,
        draft_memory: DraftMemory,
        draft_model: Any,
        *,
        place: torch.device | None = None,
    ) -> None:
        """`proposer`: who drafts, None for nobody; with its memory and its own model. `place`: where tensors lie, if not on the
        model's device; on `meta` launches can be recorded."""
        spec = loaded.model.spec
        self._place = place or loaded.device
        self.page_size = choose_page_size(settings, spec)
        self.kv_dtype = choose_kv_dtype(settings, loaded.dtype)
        self.kv_spec = structs.replace(spec.kv, layers=spec.kv.layers + draft_memory.kv_layers)
        self.page_bytes = page_bytes(spec.kv, draft_memory, self.page_size, self.kv_dtype)
        self._settings, self._loaded, self._plugins, self._sizes = settings, loaded, plugins, sizes
        self._proposer, self._draft_kv, self._draft_model = proposer, draft_memory.kv, draft_model
        self._attention_spec = AttentionSpec(
            model=spec,
            device=loaded.device.type,
            dtype=name_of(loaded.dtype),
            kv_dtype=name_of(self.kv_dtype),
            page_size=self.page_size,
            deterministic=settings.engine.deterministic,
        )
        # Refused before anything is allocated.
        for phase in PHASES:
            candidates(settings, self._attention_spec, plugins, phase)

    def tables(self, device: torch.device, slots: int | None = None) -> SlotTables:
        sizes = self._sizes
        return SlotTables(
            slots or sizes.slots,
            sizes.context,
            self.page_size,
            self._loaded.model.spec.vocab_size,
            device,
            max_drafts=sizes.drafts,
            grammar_states=sizes.grammar_states,
            token_masks=sizes.token_masks,
        )

    def make(self, pages: int, slots: int | None = None) -> Parts:
        settings, loaded = self._settings, self._loaded
        tables = self.tables(self._place, slots)
        pool = self._pool(self.kv_spec, pages)
        attention = draft_attention = self._attention(self._attention_spec, pool)
        draft_pool = None
        if self._draft_kv is not None:
            draft_spec = replace(self._attention_spec, model=structs.replace(loaded.model.spec, kv=self._draft_kv))
            draft_pool = self._pool(self._draft_kv, pages)
            draft_attention = self._attention(draft_spec, draft_pool, or_any=True)
        capturable = all(getattr(backend, "capturable", False) for backend in (attention, draft_attention))
        proposer, states = self._make_proposer(tables, draft_attention, pages)
        programs = StepPrograms(
            loaded.model,
            attention,
            tables,
            proposer,
            proposer_name=self._proposer.name if self._proposer is not None else "",
            synthetic=synthetic_share(settings, self._sizes.drafts),
            graphs=self._place.type == "cuda" and settings.engine.cuda_graphs and capturable,
        )
        return Parts(programs, tables, pool, draft_pool, states)

    def _make_proposer(
        self, tables: SlotTables, attention: AttentionBackend, pages: int
    ) -> tuple[Proposer | None, tuple[Tensor, ...]]:
        """With its page states."""
        if self._proposer is None:
            return None, ()
        context = ProposerContext(
            self._settings,
            self._loaded.model,
            tables,
            attention,
            self._sizes.drafts,
            pages,
            name_of(self._loaded.dtype),
            self._draft_model,
        )
        made = self._proposer.make(context)
        return made, self._proposer.page_states(made, pages)

    def _pool(self, kv: KVSpec, pages: int) -> KVPool:
        return KVPool(kv, pages, self.page_size, self.kv_dtype, self._place)

    def _attention(self, spec: AttentionSpec, pool: KVPool, *, or_any: bool = False) -> AttentionBackend:
        loaded, context = self._loaded, self._sizes.context
        return attention_for(self._settings, spec, pool, self._plugins, context, loaded.library, or_any=or_any)
