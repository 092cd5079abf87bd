"""Decode of grouped heads by xqa: it takes lengths and page tables from device memory, so it can be captured."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch

SEMAPHORE_BYTES = 8 << 20
"""Four bytes a (sequence, KV head, tile of rows) that is split."""
SCRATCH_BYTES = 32 << 20
"""Partial results: at most one a multiprocessor, up to 64 rows of 256 float32 and their sums."""


class PagedDecode:
    """Its workspace stays where it is: captured programs write there. For one stream."""

    def __init__(self, device: torch.device) -> None:
        # xqa counts the semaphores back to zero itself; at first they must be zero.
        self._semaphores = torch.zeros(SEMAPHORE_BYTES // 4, dtype=torch.int32, device=device).view(torch.uint32)
        self._scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device=device)
        self._run = importlib.import_module("flashinfer.xqa").xqa
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float) -> Tensor:
        """q [N · q, H, D] contiguous, k_pages and v_pages [P, page, Hkv, D] → [N · q, H, D]. Row j of a sequence's q sees all
        but its last q - 1 - j keys."""
        total, heads, dim = q.shape
        rows = batch.query_length or 1
        out = torch.empty_like(q)
        if not total:
            return out
        sequences = total // rows
        shape = (sequences, 1, heads, dim) if rows == 1 else (sequences, 1, rows, heads, dim)
        self._run(
            q.view(shape),
            k_pages,
            v_pages,
            batch.page_table,
            batch.kv_lengths.view(torch.uint32).unsqueeze(1),
            out.view(shape),
            self._scratch,
            self._semaphores,
            k_pages.shape[2],
            k_pages.shape[1],
            q_scale=scale * math.sqrt(dim),  # it divides by the root itself
            q_seq_len=rows,
            mask=self._mask(sequences, rows, q.device) if rows > 1 else None,
        )
        return out

    def _mask(self, sequences: int, rows: int, device: torch.device) -> Tensor:
        """[N, q, 2] uint16: bit i of row j, of the 32 of a row, says that it sees the i-th of the last q keys."""
        known = self._masks.get((sequences, rows))
        if known is None:
            bits = [(1 << (row + 1)) - 1 for row in range(rows)]
            # Made at a program's first run, which is not captured; it must stay.
            one = torch.tensor(bits, dtype=torch.int32, device=device)
            known = one.view(1, rows, 1).repeat(sequences, 1, 1).view(torch.uint16)
            self._masks[sequences, rows] = known
        return known
