"""Running sequences' KV side by side: a copy of their pages in which decode only appends, instead of gathering them every step.

Used on the CPU, where the gather would cost more than the attention. The pool stays the truth: the copy is made from it anew
whenever the sequences of a pass are not those of the pass before, one step further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch

MEMORY = 1 << 30
"""Bytes that copies may take; sequences whose KV is larger are gathered."""
_STEP = 64
"""Room is made for this many tokens more than are there."""


class Window:
    """Copies of N sequences' KV in some layers: for each of a layer's pool tensors one [N, room, ...].

    Position p of sequence i is at [i, p]. What lies past a sequence's end is finite and means nothing.
    """

    def __init__(self, bytes_per_token: int) -> None:
        """`bytes_per_token` of the layers that one pass runs through."""
        self._bytes_per_token = bytes_per_token
        self.drop()

    def drop(self) -> None:
        """Forget everything."""
        self._layers: dict[int, tuple[Tensor, ...]] = {}
        self._stale: set[int] = set()
        """Layers whose copy must be made from the pool."""
        self._slots = torch.empty(0, dtype=torch.int64)
        self._tokens = torch.empty(0, 0, dtype=torch.int32)
        """[N, room] tokens whose KV the copy holds: what a position holds depends on the tokens up to it alone."""
        self._written: list[int] = []
        self._room = 0
        self.rows = torch.empty(0, dtype=torch.int64)
        """[T], where this pass's rows go in the copy seen as [N · room] rows."""

    def begin(self, batch: Batch, keys: int) -> bool:
        """Get ready for a decode pass of up to `keys` keys a sequence; False if there is no memory for a copy."""
        ends = batch.kv_lengths.tolist()
        rows = batch.query_length or 1
        first = [end - rows for end in ends]
        if not self._continues(batch, first, keys):
            room = -(-(keys + _STEP) // _STEP) * _STEP
            if len(ends) * room * self._bytes_per_token > MEMORY:
                self.drop()
                return False
            self._restart(batch, room)
        sequence = batch.sequences
        # What an inert row leaves depends on more than the tokens up to it: no token stands for that.
        known = batch.tokens.where(batch.kv_rows >= batch.page_size, -1)
        self._tokens[sequence, batch.positions] = known.to(torch.int32)
        self._written = ends
        self.rows = sequence * self._room + batch.positions
        return True

    def _continues(self, batch: Batch, first: list[int], keys: int) -> bool:
        if keys > self._room or len(first) != len(self._written) or not torch.equal(batch.slots, self._slots):
            return False
        if any(now > before for now, before in zip(first, self._written, strict=True)):
            return False
        longest = max(first)
        unknown = torch.arange(longest) >= torch.tensor(first).unsqueeze(1)
        same = (batch.history[batch.slots, :longest] == self._tokens[:, :longest]) | unknown
        return bool(same.all())

    def _restart(self, batch: Batch, room: int) -> None:
        room = min(room, batch.page_table.shape[1] * batch.page_size)
        self._slots = batch.slots.clone()
        self._tokens = torch.zeros(len(self._slots), room, dtype=torch.int32)
        width = min(room, batch.history.shape[1])
        self._tokens[:, :width] = batch.history[batch.slots, :width]
        if room != self._room or len(self._slots) != len(self._written):
            self._layers = {}
        self._room = room
        self._stale = set(self._layers)

    def layer(self, number: int, pages: tuple[Tensor, ...], chosen: Tensor, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The layer's copies, this pass's rows `new` ([T, ...] each) written to them.

        `pages`: the layer's pool tensors [pages, page_size, ...], into which the rows have been written too; `chosen` [N, P],
        the page numbers of the sequences up to the pass's last key → tensors [N, room, ...].
        """
        copies = self._layers.get(number)
        if copies is None or number in self._stale:
            self._stale.discard(number)
            copies = self._copy(copies, pages, chosen)
            self._layers[number] = copies
            return copies
        for copy, rows in zip(copies, new, strict=True):
            copy.flatten(0, 1).index_copy_(0, self.rows, rows)
        return copies

    def _copy(self, copies: tuple[Tensor, ...] | None, pages: tuple[Tensor, ...], chosen: Tensor) -> tuple[Tensor, ...]:
        sequences, count = chosen.shape
        if copies is None:
            copies = tuple(tensor.new_zeros(sequences, self._room, *tensor.shape[2:]) for tensor in pages)
        for copy, tensor in zip(copies, pages, strict=True):
            gathered = tensor.index_select(0, chosen.flatten()).view(sequences, count * tensor.shape[1], *tensor.shape[2:])
            copy[:, : gathered.shape[1]] = gathered
        return copies
