"""The step programs bound to one model: what the executor launches without knowing what is inside.

A decode program is keyed by (bucket of slots, drafts verified, drafts left, features). Its only input from the host is the
list of slots, in a tensor that stays where it is, so on a GPU it is captured. Of a prefill program the pass through the target
is, where the attention backend can plan it outside.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any, TypeVar

import torch
from msgspec import structs
from torch import Tensor

from ..core.batch import Batch
from ..core.buckets import bucket_of
from ..core.executor import Pending, SlotRows
from ..core.graphs import Graphs
from ..core.handoff import PassWatcher, watched
from ..core.protocols import AttentionBackend, Model, PlannedPrefill, Proposer
from ..core.slots import SlotTables
from ..core.staging import to_host, upload
from ..core.types import Drafting, FinishReason, PrefillChunk, SlotResult, StepPlan, TokenLogprob
from ..kernels import in_kernels
from .commit import OUT_OF_BUDGET, RUNNING, STOPPED, Committed
from .decode import decode
from .left_drafts import LeftDrafts, with_drafts
from .logprobs import Logprobs, keep_top
from .padded_prefill import PaddedPrefill
from .prefill import prefill, prefill_batch
from .result_ring import Published, ResultRing, from_results, results_of
from .resume import resume

log = logging.getLogger(__name__)

Result = TypeVar("Result", Committed, Logprobs)

_FINISH: dict[int, FinishReason | None] = {RUNNING: None, STOPPED: "stop", OUT_OF_BUDGET: "length"}


class StepPrograms:
    """Prefill and decode of one model over one set of slot tables."""

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        tables: SlotTables,
        proposer: Proposer | None = None,
        *,
        proposer_name: str = "",
        synthetic: float | None = None,
        graphs: bool = False,
    ) -> None:
        """`proposer_name`: how the log calls it; `synthetic`: share of drafts that are accepted whatever they are; `graphs`:
        capture programs (CUDA)."""
        self.model = model
        self.attention = attention
        self.tables = tables
        self.proposer = proposer
        self.synthetic = synthetic
        self.rehearses = False
        self.drafting_error: str | None = None
        self.verified = 0
        self.eager = False
        """Launch each kernel by itself though graphs could be had, for who looks at them one by one."""
        self._proposer_name = proposer_name
        self._graphs: Graphs[Any] | None = Graphs() if graphs else None
        self.ring: ResultRing | None = None
        if in_kernels(tables.ints):
            self.ring = ResultRing(tables.slots, tables.max_drafts + 1, tables.vocab_size, tables.padding_slot, tables.device)
        self._padded_prefill = self._padding_prefill(attention)
        self._slots: dict[int, Tensor] = {}
        """Bucket → its static input."""
        self._uploaded: dict[int, list[int]] = {}
        """Bucket → what stands there."""
        self._watcher: PassWatcher | None = None
        self._prefill_attention = attention
        self.prefilled = 0
        """Tokens that prefill programs have computed."""

    @property
    def captures(self) -> bool:
        """Are programs captured?"""
        return self._graphs is not None

    def watch(self, watcher: PassWatcher) -> None:
        """Let `watcher` follow prefill passes, layer by layer."""
        self._watcher = watcher
        if self._graphs is not None:
            self._graphs.clear()  # of passes that nobody followed
        self._prefill_attention = watched(self.attention, watcher)
        self._padded_prefill = self._padding_prefill(self.attention, watcher)

    def _padding_prefill(self, attention: AttentionBackend, watcher: PassWatcher | None = None) -> PaddedPrefill | None:
        if not isinstance(attention, PlannedPrefill):
            return None
        return PaddedPrefill(self.model, attention, self.tables, self._graphs, watcher)

    def through_layers(self, chunks: list[PrefillChunk]) -> tuple[Batch, Tensor]:
        """A prefill pass through the target: its batch, and hidden states [T, hidden]."""
        if self._padded_prefill is not None:
            found = self._padded_prefill.run(chunks, eager=self.eager)
            if found is not None:
                return found
        batch = prefill_batch(chunks, self.tables)
        return batch, self.model.forward(batch, self._prefill_attention)

    def drop_proposer(self, reason: str) -> None:
        self.proposer = None
        if self._graphs is not None:
            self._graphs.clear()
        self.drafting_error = f"{self._proposer_name}: {reason}"
        log.error("%s is switched off: %s. Requests go on without drafts.", self._proposer_name, reason)

    def run(self, plan: StepPlan) -> list[Pending]:
        """Enqueue the plan's programs on the current stream; nothing is read back here."""
        pending: list[Pending] = []
        if plan.prefill:
            self.prefilled += sum(chunk.count for chunk in plan.prefill)
            if self._watcher is not None:
                self._watcher.begin(plan)
            pending.append(self._prefill(plan.prefill, plan))
            if self._watcher is not None:
                self._watcher.end()
        if plan.resume:
            resume(plan.resume, plan.drafting.verify, plan.features, self)
        if plan.decode:
            pending.append(self._decode(plan))
        told = self._told(plan)
        if told and plan.drafting.draft:
            pending = with_drafts(pending, LeftDrafts(told, plan.drafting.draft, self.tables))
        return pending

    def prepare(self, bucket: int, drafting: Drafting, features: int) -> bool:
        """Let the program of such decode steps run once, over slots of nobody, unless it has been captured. → is it ready?"""
        if self._graphs is None or self.eager:
            return True
        slots = self._static_slots([self.tables.padding_slot] * bucket)
        key = bucket, drafting.verify, drafting.draft, features
        if not self._graphs.ready(key):
            self._graphs.run(key, lambda: decode(slots, drafting, features, self))
        return self._graphs.ready(key)

    def _told(self, plan: StepPlan) -> list[int]:
        """Slots whose drafts the host wants to know."""
        if plan.drafting.look:
            return [*(chunk.slot for chunk in plan.prefill if chunk.last), *plan.decode]
        return [masks.slot for masks in plan.masks]

    def _prefill(self, chunks: list[PrefillChunk], plan: StepPlan) -> Pending:
        committed, logprobs, prompt = prefill(chunks, plan.drafting.draft, plan.features, self)
        return _PrefillPending(
            chunks,
            _fetch(committed) if committed is not None else None,
            _fetch(logprobs) if logprobs is not None else None,
            [_fetch(piece) if piece is not None else None for piece in prompt],
        )

    def _decode(self, plan: StepPlan) -> Pending:
        drafting, features = plan.drafting, plan.features
        self.verified = drafting.verify
        if self._graphs is None or self.eager:
            slots = upload(plan.decode, torch.int64, self.tables.device)
            if drafting.verify and slots.device.type == "cpu" and not self.tables.drafted[slots].any():
                # Here the host may look: rows for drafts that nobody has would be computed for nothing.
                drafting, self.verified = structs.replace(drafting, verify=0), 0
            committed, logprobs = decode(slots, drafting, features, self)
        else:
            slots = self._static_slots(plan.decode)
            key = slots.shape[0], drafting.verify, drafting.draft, features
            committed, logprobs = self._graphs.run(key, lambda: decode(slots, drafting, features, self))
        if self.ring is None:
            return _DecodePending(plan.decode, committed, logprobs)
        return _PublishedPending(plan.decode, self.ring.taken(results_of(committed, logprobs)))

    def _static_slots(self, wanted: list[int]) -> Tensor:
        """The bucket's input, holding `wanted` and the inert padding slot. Steps mostly run the same slots as the one before:
        then there is nothing to copy."""
        bucket = bucket_of(len(wanted))
        padded = wanted + [self.tables.padding_slot] * (bucket - len(wanted))
        slots = self._slots.get(bucket)
        if slots is None:
            slots = self._slots[bucket] = torch.empty(bucket, dtype=torch.int64, device=self.tables.device)
        if self._uploaded.get(bucket) != padded:
            slots.copy_(upload(padded, torch.int64, self.tables.device))
            self._uploaded[bucket] = padded
        return slots


def _fetch(result: Result) -> Result:
    """Its tensors on the way to the host."""
    return type(result)(*(to_host(getattr(result, field.name)) for field in fields(result)))


class _DecodePending:
    def __init__(self, slots: list[int], committed: Committed, logprobs: Logprobs | None) -> None:
        self.slots, self.committed, self.logprobs = slots, committed, logprobs

    def read(self, rows: SlotRows) -> list[SlotResult]:
        return _slot_results(self.slots, self.committed, self.logprobs, rows)


class _PublishedPending:
    def __init__(self, slots: list[int], published: Published) -> None:
        self.slots, self.published = slots, published

    def read(self, rows: SlotRows) -> list[SlotResult]:
        self.published.check()
        return _slot_results(self.slots, *from_results(self.published.views), rows)


class _PrefillPending:
    def __init__(
        self,
        chunks: list[PrefillChunk],
        committed: Committed | None,
        logprobs: Logprobs | None,
        prompt: list[Logprobs | None],
    ) -> None:
        self.chunks, self.committed, self.logprobs, self.prompt = chunks, committed, logprobs, prompt

    def read(self, rows: SlotRows) -> list[SlotResult]:
        last = [chunk.slot for chunk in self.chunks if chunk.last]
        drawn = _slot_results(last, self.committed, self.logprobs, rows) if self.committed is not None else []
        results = {result.slot: result for result in drawn}
        for chunk, prompt in zip(self.chunks, self.prompt, strict=True):
            if prompt is None or chunk.prompt_logprobs is None:
                continue
            result = results.setdefault(chunk.slot, SlotResult(chunk.slot, rows.generations[chunk.slot], [], None))
            result.prompt_logprobs = [keep_top(lp, chunk.prompt_logprobs) for lp in prompt.to_lists()]
        return list(results.values())


def _slot_results(slots: list[int], committed: Committed, logprobs: Logprobs | None, rows: SlotRows) -> list[SlotResult]:
    """One result a slot, in order."""
    width = committed.packed.shape[1] - 4
    lists = logprobs.to_lists() if logprobs is not None else None
    results = []
    # A batch was padded to its bucket behind `slots`.
    for i, (slot, row) in enumerate(zip(slots, committed.packed.tolist(), strict=False)):
        *tokens, count, state, drafted, accepted = row
        wanted = rows.logprobs[slot]
        chosen: list[TokenLogprob] | None = None
        if lists is not None and wanted is not None:
            chosen = [keep_top(lp, wanted) for lp in lists[i * width : i * width + count]]
        finished = _FINISH[state] if count else None
        results.append(
            SlotResult(slot, rows.generations[slot], tokens[:count], finished, chosen, drafted=drafted, accepted=accepted)
        )
    return results
