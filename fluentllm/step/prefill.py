"""The prefill program: KV for chunks of several prompts in one ragged pass, and the first token where a prompt ends.

Its lengths are known to the host, so attention may be planned there. The tokens are read from the slots' histories. The pass
through the target's layers is one launch where it can be (`padded_prefill`), and what follows it a few.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.protocols import Model
from ..core.slots import SlotTables
from ..core.staging import upload, upload_all
from ..core.types import PrefillChunk
from .commit import Committed
from .decode import Target, draft, draw_and_commit
from .logprobs import Logprobs, logprobs_of

LOGPROB_ROWS = 128
"""Rows of prompt logits computed at a time: [128, V] float32 is what they cost in memory."""


def prefill_batch(chunks: list[PrefillChunk], tables: SlotTables) -> Batch:
    """The rows of all chunks, one sequence a chunk."""
    lengths = tuple(chunk.count for chunk in chunks)
    kv_lengths = tuple(chunk.start + chunk.count for chunk in chunks)
    slots, starts, counts, ends, query_start = upload_all(
        [[c.slot for c in chunks], [c.start for c in chunks], lengths, kv_lengths, [0, *accumulate(lengths)]], tables.device
    )
    rows = torch.arange(sum(lengths), device=tables.device)
    sequences = torch.repeat_interleave(counts, output_size=rows.shape[0])
    positions = rows - query_start[sequences] + starts[sequences]
    page_table = tables.page_table[slots]
    pages = page_table[sequences, positions // tables.page_size]
    return Batch(
        tokens=tables.history[slots[sequences], positions].to(torch.int64),
        positions=positions,
        sequences=sequences,
        slots=slots,
        query_start=query_start.to(torch.int32),
        kv_lengths=ends.to(torch.int32),
        page_table=page_table,
        kv_rows=pages * tables.page_size + positions % tables.page_size,
        history=tables.history,
        page_size=tables.page_size,
        query_length=None,
        query_lengths=lengths,
        kv_lengths_host=kv_lengths,
    )


def prefill(
    chunks: list[PrefillChunk], drafts: int, features: int, target: Target
) -> tuple[Committed | None, Logprobs | None, list[Logprobs | None]]:
    """Compute the chunks; draw a token, and leave `drafts` drafts, for those that are a prompt's last, in order. Third: prompt
    logprobs a chunk."""
    tables, model = target.tables, target.model
    batch, hidden = target.through_layers(chunks)
    batch.features = features
    prompt_logprobs = [
        _prompt_logprobs(hidden[end - chunk.count : end], chunk, tables, model) if chunk.prompt_logprobs is not None else None
        for chunk, end in zip(chunks, accumulate(chunk.count for chunk in chunks), strict=True)
    ]
    last = upload([i for i, chunk in enumerate(chunks) if chunk.last], torch.int64, tables.device)
    if last.numel() == 0:
        draft(batch, hidden, batch.slots[:0], 0, target)
        return None, None, prompt_logprobs
    rows = batch.query_start[last + 1].to(torch.int64) - 1
    ends = replace(
        batch,
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        sequences=torch.arange(last.numel(), device=tables.device),
        slots=batch.slots[last],
        query_length=1,
    )
    committed, logprobs = draw_and_commit(model.logits(hidden[rows]), ends, features, tables)
    draft(batch, hidden, ends.slots, drafts, target)
    return committed, logprobs, prompt_logprobs


def _prompt_logprobs(hidden: Tensor, chunk: PrefillChunk, tables: SlotTables, model: Model) -> Logprobs | None:
    """Of the tokens that follow each row of the chunk, within the prompt: row p predicts the token at p + 1."""
    count = chunk.count - 1 if chunk.last else chunk.count
    if count == 0:
        return None
    targets = tables.history[chunk.slot, chunk.start + 1 : chunk.start + 1 + count].to(torch.int64)
    pieces = [
        logprobs_of(model.logits(h), t)
        for h, t in zip(hidden[:count].split(LOGPROB_ROWS), targets.split(LOGPROB_ROWS), strict=True)
    ]
    columns = ("tokens", "chosen", "rank", "top_tokens", "top")
    return Logprobs(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in columns))
