"""Batches that share a program: what is captured, and what is measured, is keyed by bucket. Torch-free."""

from __future__ import annotations

CAPTURED_TOKENS = 4096
"""Of a prefill pass that is captured. Larger ones take the device longer than launching takes the host, and graphs keep the
memory that their passes work in."""
CAPTURED_KEYS = 8192
"""Of all sequences of such a pass, where its memory grows with them: where MLA expands what was computed before."""


def bucket_of(batch: int) -> int:
    """Slots of the program that runs `batch` of them: 1, 2, 4, 8, then steps of an eighth of the next power of two, so that
    less than a fifth of the rows is padding."""
    if batch <= 8:
        return 1 << max(0, batch - 1).bit_length()
    step = (1 << (batch - 1).bit_length()) // 8
    return -(-batch // step) * step
