"""Batches that share a program: what is captured, and what is measured, is keyed by bucket. Torch-free."""

from __future__ import annotations


def bucket_of(batch: int) -> int:
    """Slots of the program that runs `batch` of them: 1, 2, 4, 8, then steps of an eighth of the next power of two, so that
    less than a fifth of the rows is padding."""
    if batch <= 8:
        return 1 << max(0, batch - 1).bit_length()
    step = (1 << (batch - 1).bit_length()) // 8
    return -(-batch // step) * step
