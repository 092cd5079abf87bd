"""Batches that share a program: what is captured, and what is measured, is keyed by bucket. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

CAPTURED_TOKENS = 8192
"""Of a prefill pass that is captured. Graphs keep the memory that their passes work in, so there must be a limit; larger passes
take the device longer than launching takes the host."""
CAPTURED_KEYS = 16384
"""Of all sequences of such a pass, where its memory grows with them: where MLA expands what was computed before."""


def captured_pages(kv_lengths: Iterable[int], page_size: int) -> int | None:
    """Pages that a captured pass expands: a few more than its sequences fill, so that fewer programs serve; None: too many."""
    pages = bucket_of(sum(-(-keys // page_size) for keys in kv_lengths))
    return pages if pages * page_size <= CAPTURED_KEYS else None


def bucket_of(batch: int) -> int:
    """Slots of the program that runs `batch` of them: 1, 2, 4, 8, then steps of an eighth of the next power of two, so that
    less than a fifth of the rows is padding."""
    if batch <= 8:
        return 1 << max(0, batch - 1).bit_length()
    step = (1 << (batch - 1).bit_length()) // 8
    return -(-batch // step) * step


def bucket_within(batch: int) -> int:
    """The largest bucket of at most `batch` > 0."""
    if batch < 8:
        return 1 << batch.bit_length() - 1
    step = max(1, (1 << batch.bit_length()) // 8)
    return batch // step * step
