"""The decode program: one function from slots to their next tokens, the same for any number of drafts.

gather slots → embed the last token and K drafts → target layers → logits at K+1 positions → processors → draw → verify →
append to history, lengths and counts → draft for the next step → results to the host's ring
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.protocols import AttentionBackend, Model, Proposer
from ..core.slots import SlotTables
from ..core.types import Drafting, Feature, PrefillChunk
from ..kernels import in_kernels
from .commit import Committed, commit, leave_drafts
from .grammar import advance, allowed_drafts, drop_unmasked, forbid_masked, forbid_tokens
from .logprobs import Logprobs, logprobs_of
from .processors import process_logits
from .result_ring import ResultRing, results_of
from .sample import draw
from .synthetic import accept_at_random

log = logging.getLogger(__name__)


def decode_batch(slots: Tensor, drafts: int, tables: SlotTables) -> Batch:
    """slots [B] int64 → the rows of one decode pass: each slot's last token and its `drafts` drafts.

    Rows of finished slots are inert, and so are those of drafts that nobody left (`tables.drafted` counts those that were):
    they write to the scratch page, and what they compute is not committed. One launch on a GPU; `decode_batch_reference` is the
    plain form.
    """
    if not in_kernels(slots):
        return decode_batch_reference(slots, drafts, tables)
    from ..kernels.triton.commit import decode_rows

    rows = drafts + 1
    found = decode_rows(
        slots, rows, tables.length, tables.drafted, tables.finished, tables.history, tables.page_table, tables.page_size
    )
    return Batch(
        tokens=found.tokens,
        positions=found.positions,
        sequences=found.sequences,
        slots=slots,
        query_start=found.query_start,
        kv_lengths=found.kv_lengths,
        page_table=found.page_table,
        kv_rows=found.kv_rows,
        history=tables.history,
        page_size=tables.page_size,
        query_length=rows,
        query_lengths=None,
    )


def decode_batch_reference(slots: Tensor, drafts: int, tables: SlotTables) -> Batch:
    """slots [B] int64 → the batch, as `decode_batch`."""
    rows = drafts + 1
    batch = slots.shape[0]
    device = slots.device
    first = tables.length[slots] - 1
    offsets = torch.arange(rows, device=device)
    positions = (first.unsqueeze(1) + offsets).view(-1)
    row_slots = slots.repeat_interleave(rows) if drafts else slots
    page_table = tables.page_table[slots]
    sequences = torch.arange(batch, device=device)
    sequences = sequences.repeat_interleave(rows) if drafts else sequences
    pages = page_table[sequences, positions // tables.page_size]
    live = ~tables.finished[row_slots]
    if drafts:
        live &= (offsets <= tables.drafted[slots].unsqueeze(1)).view(-1)
    kv_rows = (pages * tables.page_size + positions % tables.page_size).where(live, 0)
    return Batch(
        tokens=tables.history[row_slots, positions].to(torch.int64),
        positions=positions,
        sequences=sequences,
        slots=slots,
        query_start=torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=device),
        kv_lengths=(first + rows).to(torch.int32),
        page_table=page_table,
        kv_rows=kv_rows,
        history=tables.history,
        page_size=tables.page_size,
        query_length=rows,
        query_lengths=None,
    )


class Target(Protocol):
    """What a step runs on; `programs.StepPrograms` is one."""

    model: Model
    attention: AttentionBackend
    tables: SlotTables
    proposer: Proposer | None
    synthetic: float | None
    """Share of drafts that are accepted whatever they are (`step.synthetic`); None: those that are right."""
    ring: ResultRing | None
    """Takes the results of decode programs; None on a CPU, where the host reads them where they are."""
    rehearses: bool
    """Are these steps run to see what memory they take? Then running out of it is an answer, not the proposer's failure."""

    def through_layers(self, chunks: list[PrefillChunk]) -> tuple[Batch, Tensor]:
        """A prefill pass through the target: its batch, and hidden states [T, hidden]."""
        ...

    def drop_proposer(self, reason: str) -> None:
        """Draft no more."""
        ...


def decode(slots: Tensor, drafting: Drafting, features: int, target: Target) -> tuple[Committed, Logprobs | None]:
    """Advance slots [B] int64 by one step that verifies `drafting.verify` drafts of each and leaves `drafting.draft`."""
    batch = decode_batch(slots, drafting.verify, target.tables)
    batch.features = features
    hidden = target.model.forward(batch, target.attention)
    committed, logprobs = draw_and_commit(target.model.logits(hidden), batch, features, target.tables, target.synthetic)
    draft(batch, hidden, slots, drafting.draft, target)
    if target.ring is not None:
        target.ring.publish(results_of(committed, logprobs), slots)
    return committed, logprobs


def draft(batch: Batch, hidden: Tensor, slots: Tensor, count: int, target: Target) -> None:
    """Let the proposer see the pass, and leave its drafts in the slots that got tokens. One that fails is dropped: what the
    target computes needs no drafts."""
    if target.proposer is not None:
        proposer = target.proposer
        # Its method is looked up inside too, where what is wrong with a proposer is caught.
        propose(lambda *wanted: proposer.draft(batch, hidden, *wanted), slots, count, batch.features, target)


def propose(
    call: Callable[[Tensor, int], tuple[Tensor, Tensor]], slots: Tensor, count: int, features: int, target: Target
) -> None:
    """Leave the drafts of `call(slots, count)` in the slots, up to what grammars forbid; drop a proposer that fails, even by an
    exit: nothing of it may end a step. No cancellation reaches the threads that steps are launched on, so one that is raised
    here is the proposer's too."""
    try:
        drafts, valid = call(slots, count)
        wrong = wrong_drafts(drafts, valid, slots, count)
        if wrong is None and count:
            if features & Feature.GRAMMAR:
                valid = allowed_drafts(drafts, valid, slots, target.tables)
            leave_drafts(drafts, valid, slots, target.tables)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if target.rehearses and isinstance(error, torch.OutOfMemoryError):
            raise
        log.debug("the proposer failed", exc_info=True)
        wrong = f"it raised {type(error).__name__}: {error}"
    if wrong is not None:
        target.drop_proposer(wrong)


def wrong_drafts(drafts: Tensor, valid: Tensor, slots: Tensor, count: int) -> str | None:
    """What is wrong with the shapes, types and layouts of a proposer's answer. Reads nothing from the device."""
    for name, tensor, shape in (("drafts", drafts, (slots.shape[0], count)), ("valid", valid, (slots.shape[0],))):
        if not isinstance(tensor, Tensor):
            return f"it returned {type(tensor).__name__} as {name}, not a tensor"
        right = tuple(tensor.shape) == shape and tensor.dtype == torch.int64 and tensor.device == slots.device
        if not right or tensor.layout != torch.strided:
            found = f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}, {tensor.layout}"
            return f"it returned {found}; expected {list(shape)} torch.int64 on {slots.device}, {torch.strided}"
    return None


def draw_and_commit(
    logits: Tensor, batch: Batch, features: int, tables: SlotTables, synthetic: float | None = None
) -> tuple[Committed, Logprobs | None]:
    """logits [B × q, V] float32 of a pass with q rows a slot → tokens in the slots' histories."""
    rows = batch.query_length or 1
    slots = batch.slots
    row_slots = slots[batch.sequences] if rows > 1 else slots
    positions = batch.positions + 1
    drafts = batch.tokens.view(-1, rows)[:, 1:]
    raw = logits.clone() if features & Feature.LOGPROBS else logits
    logits = process_logits(logits, row_slots, positions, drafts, tables, features)
    if features & Feature.GRAMMAR:
        forbid_tokens(logits, slots, drafts, tables)
    if features & Feature.TOKEN_MASKS:
        forbid_masked(logits, slots, rows, tables)
        drop_unmasked(slots, tables)
    drawn = draw(logits, row_slots, positions, tables, features)
    right = None
    if synthetic is not None and rows > 1:
        drawn, right = accept_at_random(drawn.view(-1, rows), drafts, positions.view(-1, rows), slots, tables, synthetic)
        drawn = drawn.view(-1)
    logprobs = logprobs_of(raw, drawn) if features & Feature.LOGPROBS else None
    committed = commit(drawn.view(-1, rows), drafts, slots, tables, features, right)
    if features & Feature.GRAMMAR:
        advance(committed.tokens, committed.counts, slots, tables)
    return committed, logprobs
