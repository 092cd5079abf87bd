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
SMALL_PASS = 512
"""Rows of a pass up to which sizes are two to a power of two: reading the weights takes about as long as computing, so that
padding costs little but where attention to many keys is what takes the time."""
LEAST_ROWS = 32
"""Of a captured pass."""


def bucket_of(batch: int) -> int:
    """Slots of the program that runs `batch` of them: 1, 2, 4, 8, then steps of an eighth of the next power of two, so that
    less than a fifth of the rows is padding."""
    if batch <= 8:
        return 1 << max(0, batch - 1).bit_length()
    step = (1 << (batch - 1).bit_length()) // 8
    return -(-batch // step) * step


def pass_rows(tokens: int) -> int:
    """Rows of the captured pass that computes `tokens` prompt tokens. Few sizes, for each is captured: up to SMALL_PASS 32, 48,
    64, 96, 128, 192, 256, 384 and 512, then as `bucket_of`."""
    return bucket_of(tokens) if tokens > SMALL_PASS else max(LEAST_ROWS, _half_steps(tokens))


def without_padding(tokens: int) -> int:
    """How many of `tokens` a pass should take that could take more: the largest of `pass_rows`' sizes. A padded pass takes what
    its rows take: behind 27,000 tokens of Llama-3.1-8B's shape, 139 in 256 rows took 17.5 ms, 128 took 11 (benchmarks/gpu)."""
    if tokens <= LEAST_ROWS:
        return tokens
    step = (1 << tokens.bit_length()) // (8 if tokens > SMALL_PASS else 4)
    return tokens // step * step


def _half_steps(count: int) -> int:
    """The next power of two, or three quarters of it where that is enough."""
    whole = 1 << max(0, count - 1).bit_length()
    return whole * 3 // 4 if whole >= 4 and count <= whole * 3 // 4 else whole


def captured_pages(kv_lengths: Iterable[int], page_size: int) -> int | None:
    """Pages that a captured pass expands, two sizes between powers of two: at least as many as its sequences fill; None: too
    many."""
    filled = sum(-(-keys // page_size) for keys in kv_lengths)
    pages = _half_steps(filled)
    return pages if pages * page_size <= CAPTURED_KEYS else None
