"""The step programs bound to one model: what the executor launches without knowing what is inside."""

from __future__ import annotations

import logging

import torch

from ..core.executor import Pending, SlotRows
from ..core.protocols import AttentionBackend, Model, Proposer
from ..core.slots import SlotTables
from ..core.types import FinishReason, PrefillChunk, SlotResult, StepPlan, TokenLogprob
from .commit import OUT_OF_BUDGET, RUNNING, STOPPED, Committed
from .decode import decode
from .logprobs import Logprobs, keep_top
from .prefill import prefill

log = logging.getLogger(__name__)

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
    ) -> None:
        """`proposer_name`: how the log calls it; `synthetic`: share of drafts that are accepted whatever they are."""
        self.model = model
        self.attention = attention
        self.tables = tables
        self.proposer = proposer
        self.synthetic = synthetic
        self.drafting_error: str | None = None
        self._proposer_name = proposer_name

    def drop_proposer(self, reason: str) -> None:
        self.proposer = None
        self.drafting_error = f"{self._proposer_name}: {reason}"
        log.error("%s is switched off: %s. Requests go on without drafts.", self._proposer_name, reason)

    def run(self, plan: StepPlan) -> list[Pending]:
        """Enqueue the plan's programs on the current stream; nothing is read back here."""
        pending: list[Pending] = []
        if plan.prefill:
            pending.append(self._prefill(plan.prefill, plan))
        if plan.decode:
            pending.append(self._decode(plan))
        return pending

    def _prefill(self, chunks: list[PrefillChunk], plan: StepPlan) -> Pending:
        committed, logprobs, prompt = prefill(chunks, plan.drafting.draft, plan.features, self)
        return _PrefillPending(chunks, committed, logprobs, prompt)

    def _decode(self, plan: StepPlan) -> Pending:
        slots = torch.tensor(plan.decode, dtype=torch.int64).to(self.tables.device, non_blocking=True)
        committed, logprobs = decode(slots, plan.drafting, plan.features, self)
        return _DecodePending(plan.decode, committed, logprobs)


class _DecodePending:
    def __init__(self, slots: list[int], committed: Committed, logprobs: Logprobs | None) -> None:
        self.slots, self.committed, self.logprobs = slots, committed, logprobs

    def read(self, rows: SlotRows) -> list[SlotResult]:
        return _slot_results(self.slots, self.committed, self.logprobs, rows)


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
    """Read the device: one result a slot, in order."""
    width = committed.tokens.shape[1]
    lists = logprobs.to_lists() if logprobs is not None else None
    columns = (committed.tokens, committed.counts, committed.states, committed.drafted, committed.accepted)
    results = []
    for i, (tokens, count, state, drafted, accepted) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        slot = slots[i]
        wanted = rows.logprobs[slot]
        chosen: list[TokenLogprob] | None = None
        if lists is not None and wanted is not None:
            chosen = [keep_top(lp, wanted) for lp in lists[i * width : i * width + count]]
        finished = _FINISH[state] if count else None
        results.append(
            SlotResult(slot, rows.generations[slot], tokens[:count], finished, chosen, drafted=drafted, accepted=accepted)
        )
    return results
