"""As `watching.Watched`, without the host: drafts are recorded and replaced inside the program, so that it can be captured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .watching import plugins_around

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.plugins import PluginManager
    from fluentllm.core.protocols import Proposer, ProposerContext

MOST_RECORDS = 1 << 14
OTHERS = 7
"""First token of requests that are not in the work list."""


class Entry:
    """What was left in a slot for one step to verify."""

    def __init__(self, row: list[int], k: int) -> None:
        self.live, self.first, self.number, self.length, valid, given = row[:6]
        self.own, self.given = row[6 : 6 + valid], row[6 + k : 6 + k + given]


class Record:
    """Of an engine that drafts `k`: on the device, by calls that a graph can hold. Requests are known by their seeds, which are
    their places in `texts`: prompts and right answers."""

    def __init__(self, k: int, texts: list[list[int]], vocab: int, device: torch.device) -> None:
        self.k, self.vocab = k, vocab
        longest = max(map(len, texts)) + k + 1
        self._texts = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
        self._rows = torch.zeros(MOST_RECORDS, 6 + 2 * k, dtype=torch.int64, device=device)
        self._used = torch.zeros(1, dtype=torch.int64, device=device)
        self._strategy = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self, strategy: int) -> None:
        """On the stream of the programs. 0: own drafts, 1: right ones, 2: wrong ones, 3: wrong at a place that varies."""
        self._strategy.fill_(strategy)
        self._used.zero_()

    def entries(self) -> list[Entry]:
        """Of slots that had work. Waits for the device."""
        used = int(self._used)
        assert used <= MOST_RECORDS
        found = [Entry(row, self.k) for row in self._rows[:used].tolist()]
        return [entry for entry in found if entry.live and entry.first != OTHERS]

    def doctored(self, drafts: Tensor, valid: Tensor, slots: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        k, length, seed, first = self.k, tables.length[slots], tables.seed[slots], tables.history[slots, 0].to(torch.int64)
        own = (self._strategy == 0) | (first == OTHERS)
        places = length.unsqueeze(1) + torch.arange(k, device=slots.device)
        rows = seed.clamp(0, self._texts.shape[0] - 1).unsqueeze(1)
        right = self._texts[rows, places.clamp(max=self._texts.shape[1] - 1)]
        wrong_here = (self._strategy == 2) | (
            (self._strategy == 3) & (torch.arange(k, device=slots.device) == (length % k).unsqueeze(1))
        )
        instead = torch.where(wrong_here, (right + 1) % self.vocab, right)
        given = torch.where(own.unsqueeze(1), drafts, instead)
        count = torch.where(own, valid, k)
        columns = [(~tables.finished[slots]).to(torch.int64), first, seed, length, valid, count]
        row = torch.cat((torch.stack(columns, 1), drafts, given), 1)
        at = self._used + torch.arange(slots.shape[0], device=slots.device)
        self._rows.index_copy_(0, at.clamp(max=MOST_RECORDS - 1), row)
        self._used += slots.shape[0]
        return given, count


class _Watched:
    def __init__(self, own: Proposer, context: ProposerContext, record: Record) -> None:
        self._own, self._tables, self._record = own, context.tables, record

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        drafts, valid = self._own.draft(batch, hidden, slots, count)
        if not count or not slots.shape[0]:
            return drafts, valid
        assert drafts.shape == (slots.shape[0], self._record.k)
        return self._record.doctored(drafts, valid, slots, self._tables)


def watched_on_device(method: str, record: Record) -> PluginManager:
    """Plugins with the proposer `watched`, which is that of `method`."""
    return plugins_around(method, lambda made, context: _Watched(made, context, record))
