"""Rows of writes as arrays: checked against what both sides registered, turned into addresses, cut into chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.transport import WriteRefused

if TYPE_CHECKING:
    from .wire import Region

FEW = 8
"""Up to so many rows are looked at one by one: an operation on an array costs 1 to 3 µs however short it is."""


class AddressMap:
    """Offsets over registered regions, one after another, to addresses."""

    def __init__(self, regions: Sequence[Region]) -> None:
        sizes = np.array([region.size for region in regions], dtype=np.int64)
        self.sizes = tuple(sizes.tolist())
        ends = np.cumsum(sizes)
        addresses = np.array([region.address for region in regions], dtype=np.uint64)
        self._few = ends.tolist(), [region.address - int(end) + region.size for region, end in zip(regions, ends, strict=True)]
        # One more than there are regions: what lies behind the last has no bytes.
        self._ends = np.append(ends, 0)
        self._shifts = np.append(addresses - (ends - sizes).astype(np.uint64), np.uint64(0))

    def address(self, offset: int, length: int) -> int | None:
        """As `addresses` of one range; None for what that refuses."""
        ends, shifts = self._few
        region = bisect_right(ends, offset)
        inside = offset >= 0 and region < len(ends) and length <= ends[region] - offset
        return offset + shifts[region] if inside else None

    def addresses(self, offsets: np.ndarray, lengths: np.ndarray, whose: str) -> np.ndarray:
        """int64 offsets and lengths (all > 0) [N] → uint64 addresses [N]. Raises `WriteRefused` for a range outside, or
        across the border of two regions; `whose` names the side in the error."""
        if not len(offsets):
            return np.empty(0, dtype=np.uint64)
        region = self._ends[:-1].searchsorted(offsets, side="right")
        # Compared by what is left of the region: the sum of offset and length could overflow.
        wrong = lengths > self._ends[region] - offsets
        if wrong.any() or offsets.min() < 0:
            row = int(np.argmax(wrong | (offsets < 0)))
            raise WriteRefused(
                f"Bytes {int(offsets[row])} … {int(offsets[row]) + int(lengths[row])} of write {row} lie in no single tensor "
                f"that {whose} registered; it registered {len(self.sizes)} of {list(self.sizes)} bytes."
            )
        return self._shifts[region] + offsets.astype(np.uint64)


def addressed(writes: np.ndarray, here: AddressMap, there: AddressMap, names: tuple[str, str]) -> tuple[np.ndarray, int]:
    """Writes (local offset, remote offset, length) as uint64 [N, 3] with addresses, without those of no length, and their
    bytes. Raises `WriteRefused` as `check_rows` and `AddressMap.addresses` do; names: of both sides, for the error."""
    rows = np.asarray(writes)
    if rows.ndim == 2 and len(rows) <= FEW and rows.shape[1] == 3 and rows.dtype == np.int64:
        few = [
            (here.address(local, length), there.address(remote, length), length)
            for local, remote, length in rows.tolist()
            if length
        ]
        if all(ours is not None and theirs is not None and length > 0 for ours, theirs, length in few):
            found = np.array(few, dtype=np.uint64).reshape(-1, 3)
            return found, sum(length for _, _, length in few)
    # There are many, or the error tells what is wrong.
    rows = check_rows(rows)
    lengths = rows[:, 2]
    found = np.empty(rows.shape, dtype=np.uint64)
    found[:, 0] = here.addresses(rows[:, 0], lengths, names[0])
    found[:, 1] = there.addresses(rows[:, 1], lengths, names[1])
    found[:, 2] = lengths
    return found, int(lengths.sum())


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
    shortest = int(rows[:, 2].min())
    if shortest < 0:
        raise WriteRefused(f"A write has the length {shortest}.")
    return rows if shortest else rows[rows[:, 2] > 0]


def cut(rows: np.ndarray, chunk_bytes: int, chunk_rows: int) -> list[np.ndarray]:
    """Split rows (addresses or offsets, lengths > 0) into lists of at most `chunk_rows` rows and `chunk_bytes` bytes; longer
    rows are divided."""
    if not len(rows):
        return []
    lengths = rows[:, 2]
    if len(rows) <= chunk_rows and int(lengths.sum()) <= chunk_bytes:
        return [rows]
    if int(lengths.max()) > chunk_bytes:
        rows = _divide(rows, chunk_bytes)
        lengths = rows[:, 2]
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
