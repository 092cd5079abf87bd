"""Rows of writes as arrays: checked against what both sides registered, turned into addresses, cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.transport import WriteRefused

if TYPE_CHECKING:
    from .wire import Region


class AddressMap:
    """Offsets over registered regions, one after another, to addresses."""

    def __init__(self, regions: Sequence[Region]) -> None:
        sizes = np.array([region.size for region in regions], dtype=np.int64)
        self.sizes = tuple(sizes.tolist())
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._addresses = np.array([region.address for region in regions], dtype=np.uint64)

    def addresses(self, offsets: np.ndarray, lengths: np.ndarray, whose: str) -> np.ndarray:
        """int64 offsets and lengths (all > 0) [N] → uint64 addresses [N]. Raises `WriteRefused` for a range outside, or
        across the border of two regions; `whose` names the side in the error."""
        region = np.searchsorted(self._ends, offsets, side="right")
        outside = (offsets < 0) | (region >= len(self._ends))
        region = np.where(outside, 0, region)
        # Compared by what is left of the region: the sum of offset and length could overflow.
        wrong = outside | (lengths > self._ends[region] - offsets) if len(self._ends) else np.ones(len(offsets), dtype=bool)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise WriteRefused(
                f"Bytes {int(offsets[row])} … {int(offsets[row]) + int(lengths[row])} of write {row} lie in no single tensor "
                f"that {whose} registered; it registered {len(self.sizes)} of {list(self.sizes)} bytes."
            )
        return self._addresses[region] + (offsets - self._starts[region]).astype(np.uint64)


def check_rows(writes: np.ndarray) -> np.ndarray:
    """int64 [N, 3] without rows of no length. Raises `WriteRefused` for another shape or type, or a negative length."""
    rows = np.asarray(writes)
    if rows.size == 0:
        return np.empty((0, 3), dtype=np.int64)
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in "iu":
        raise WriteRefused(f"Writes are integers [N, 3], not {rows.dtype} {list(rows.shape)}.")
    if rows.dtype.kind == "u" and (rows > np.iinfo(np.int64).max).any():
        raise WriteRefused("An offset or length of a write is above 2⁶³ - 1.")
    rows = rows.astype(np.int64, copy=False)
    if (rows[:, 2] < 0).any():
        raise WriteRefused(f"A write has the length {int(rows[:, 2].min())}.")
    return rows[rows[:, 2] > 0]


def cut(rows: np.ndarray, chunk_bytes: int, chunk_rows: int) -> list[np.ndarray]:
    """Split rows (addresses or offsets, lengths > 0) into lists of at most `chunk_rows` rows and `chunk_bytes` bytes; longer
    rows are divided."""
    if not len(rows):
        return []
    lengths = rows[:, 2]
    if int(lengths.max()) > chunk_bytes:
        rows = _divide(rows, chunk_bytes)
        lengths = rows[:, 2]
    total = int(lengths.sum())
    if total <= chunk_bytes and len(rows) <= chunk_rows:
        return [rows]
    chunks, start, ends = [], 0, np.cumsum(lengths.astype(np.int64))
    while start < len(rows):
        done = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, done + chunk_bytes, side="right"))
        stop = min(max(stop, start + 1), start + chunk_rows)
        chunks.append(rows[start:stop])
        start = stop
    return chunks


def _divide(rows: np.ndarray, limit: int) -> np.ndarray:
    """Rows of at most `limit` bytes that write the same."""
    size = np.array(limit, dtype=rows.dtype)
    pieces = ((rows[:, 2] + (size - size.dtype.type(1))) // size).astype(np.int64)
    whole = np.repeat(rows, pieces, axis=0)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    skipped = (np.arange(len(whole)) - first).astype(rows.dtype) * size
    whole[:, 0] += skipped
    whole[:, 1] += skipped
    whole[:, 2] = np.minimum(whole[:, 2] - skipped, size)
    return whole
