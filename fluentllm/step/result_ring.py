"""How a decode program's results get to the host: its last launches write them into a ring in pinned memory, so that on a GPU
a step is one graph and nothing behind it.

Each step takes the next row of the ring. Which one that is, the device counts, since a captured program is the same every time;
the host counts along, and the row says whose it is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from ..core.buckets import bucket_of
from ..core.types import MAX_LOGPROBS
from ..kernels import in_kernels
from .commit import Committed
from .logprobs import Logprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ENTRIES = 8
"""Steps whose results the ring holds. The engine launches at most two beyond the one that it reads."""
HEAD = 2
"""Words in front of a row's results: the turn, and one that keeps them at multiples of 8 bytes."""


def row_words(slots: int, rows: int, vocab_size: int) -> int:
    """Words of 32 bits that a step of so many slots × rows writes at most: `Committed`, and `Logprobs` of every row. Even, so
    that all rows lie at multiples of 8 bytes."""
    slots = bucket_of(slots)
    top = min(MAX_LOGPROBS, vocab_size)
    most = HEAD + 2 * slots * (rows + 4) + slots * rows * (5 + 3 * top) + 2 * 5
    return most + most % 2


def results_of(committed: Committed, logprobs: Logprobs | None) -> list[Tensor]:
    """What a step brings to the host, the smallest first."""
    columns = [getattr(logprobs, field.name) for field in fields(Logprobs)] if logprobs is not None else []
    return [committed.packed, *columns]


def from_results(results: Sequence[Tensor]) -> tuple[Committed, Logprobs | None]:
    """From what `results_of` gave."""
    packed, *columns = results
    return Committed(packed), Logprobs(*columns) if columns else None


def publish_reference(
    ring: Tensor, turns: Tensor, words: Tensor, slots: Tensor, padding: int, offset: int, *, last: bool
) -> None:
    """As `kernels.triton.publish.publish`."""
    turn = int(turns)
    row = ring[turn % ring.shape[0]]
    row[offset : offset + words.shape[0]] = words
    if last:
        row[0] = turn
        turns += int(slots[0] != padding)


@dataclass(frozen=True, slots=True)
class Published:
    """One step's results in the ring, there when the stream has got to them. Read them before the ring comes round."""

    row: Tensor
    turn: int
    views: list[Tensor]
    """Of the row, in the order, shapes and types of what was published."""

    def check(self) -> None:
        """Raises RuntimeError if the row is another step's."""
        found = int(self.row[0])
        if found != self.turn:
            raise RuntimeError(
                f"The results of step program {self.turn} are gone: their place in the ring has those of {found}."
            )


class ResultRing:
    """A ring for steps of up to `slots` slots × `rows` rows on `device`; on `meta` only its launches are recorded."""

    def __init__(self, slots: int, rows: int, vocab_size: int, padding_slot: int, device: torch.device) -> None:
        shape, pinned = (ENTRIES, row_words(slots, rows, vocab_size)), device.type == "cuda"
        place = "cpu" if pinned else device
        self._ring = torch.full(shape, -1, dtype=torch.int32, device=place, pin_memory=pinned)
        self._turns = torch.zeros(1, dtype=torch.int64, device=device)
        self._padding = padding_slot
        self._turn = 0
        """Of the next program that runs for somebody."""

    def publish(self, results: Sequence[Tensor], slots: Tensor) -> None:
        """Inside a program of slots [B] int64: write its results, contiguous, of 4 or 8 bytes an element. Those of a program
        whose slots are all padding are for nobody."""
        put = publish_reference
        if in_kernels(slots):
            from ..kernels.triton.publish import publish as put
        places = _places(results)
        # The first is the smallest: it goes last, and counts on.
        for number in reversed(range(len(results))):
            words = results[number].view(-1).view(torch.int32)
            put(self._ring, self._turns, words, slots, self._padding, places[number], last=number == 0)

    def taken(self, results: Sequence[Tensor]) -> Published:
        """Where the results of the program that was enqueued last are; `results`: what it published, for shapes and types."""
        turn = self._turn
        self._turn += 1
        row = self._ring[turn % ENTRIES]
        views = []
        for result, place in zip(results, _places(results), strict=True):
            words = row[place : place + result.numel() * result.itemsize // 4]
            views.append(words.view(result.dtype).view(result.shape))
        return Published(row, turn, views)


def _places(results: Sequence[Tensor]) -> list[int]:
    """Words into a row, each at a multiple of 8 bytes."""
    places, place = [], HEAD
    for result in results:
        places.append(place)
        words = result.numel() * result.itemsize // 4
        place += words + words % 2
    return places
