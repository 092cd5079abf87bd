"""Pages and layers to writes: the rows that `KVTransport.submit` takes, as few as the memory's layout allows.

Pages that follow each other on both sides become one write, since libraries pay for each (Mooncake 50 µs). Where only some
heads of a token go, a token is the most that is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import FluentError
from .slices import Slice, slices_of, sources_of

if TYPE_CHECKING:
    from .layout import KVLayout, Region


class PageError(FluentError):
    """Pages or layers that a pool does not have."""

    status, code = 400, "kv_pages_invalid"


def plan_writes(
    source: KVLayout,
    target: KVLayout,
    layers: range,
    source_pages: Sequence[int] | np.ndarray,
    target_pages: Sequence[int] | np.ndarray,
    part: Slice | None = None,
    tokens: int | None = None,
) -> np.ndarray:
    """Writes, int64 [N, 3] (local offset, remote offset, bytes), that copy `source_pages[i]` of the source's pool to
    `target_pages[i]` of the target's, in these layers (consecutive), all tensors.

    part: what this pair of ranks moves (`slices.slices_between`); None: everything, for equal pools. The layouts are those
    of the two ranks and have been checked. tokens: of each page only the first so many (of the page that a prompt ends in).

    Raises `PageError` for pages or layers outside of the pools, and for a page that
    would be written twice.
    """
    ours, theirs = _pages(source_pages, source, "source"), _pages(target_pages, target, "target")
    if len(ours) != len(theirs):
        raise PageError(f"{len(ours)} source pages for {len(theirs)} target pages.")
    if len(np.unique(theirs)) != len(theirs):
        raise PageError("A target page would be written twice.")
    if layers.step != 1 or layers.start < 0 or layers.stop > source.layers:
        raise PageError(f"Layers {layers.start} … {layers.stop - 1} of {source.layers}.")
    if not len(ours) or not len(layers):
        return np.empty((0, 3), dtype=np.int64)
    part = part or Slice(source.tp_rank, target.tp_rank, 0, 0, source.local_heads)
    # In the source's order, neighbours on both sides are neighbours in the list, whatever order the request has them in.
    order = np.argsort(ours, kind="stable")
    ours, theirs = ours[order], theirs[order]
    pairs = zip(source.tensors(), target.tensors(), strict=True)
    count = source.page_size if tokens is None else tokens
    return np.concatenate([_tensor_writes(a, b, layers, ours, theirs, part, count) for a, b in pairs])


def plan_rank_writes(
    source: KVLayout,
    target: KVLayout,
    layers: range,
    source_pages: Sequence[int],
    target_pages: Sequence[int],
    tokens: int,
) -> np.ndarray:
    """All that the source's rank writes to the target's of these layers of these pages, `tokens` of the last page, and with
    the very last layer what proposers keep for each page. As `plan_writes` otherwise."""
    whole = len(source_pages) - (tokens < source.page_size)
    rows = [np.empty((0, 3), dtype=np.int64)]
    for part in slices_of(source, target):
        rows.append(plan_writes(source, target, layers, source_pages[:whole], target_pages[:whole], part))
        if whole < len(source_pages):
            rows.append(plan_writes(source, target, layers, source_pages[whole:], target_pages[whole:], part, tokens))
    if layers.stop == source.layers and sources_of(source, target)[0] == source.tp_rank:
        rows.append(plan_state_writes(source, target, source_pages, target_pages))
    return np.concatenate(rows)


def plan_state_writes(
    source: KVLayout, target: KVLayout, source_pages: Sequence[int] | np.ndarray, target_pages: Sequence[int] | np.ndarray
) -> np.ndarray:
    """The same for what proposers keep for each page (`KVLayout.states`)."""
    ours, theirs = _pages(source_pages, source, "source"), _pages(target_pages, target, "target")
    pairs = zip(source.states(), target.states(), strict=True)
    whole = Slice(0, 0, 0, 0, 1)
    rows = [_tensor_writes(a, b, range(1), ours, theirs, whole, 1) for a, b in pairs if len(ours)]
    return np.concatenate([np.empty((0, 3), dtype=np.int64), *rows])


def _tensor_writes(
    a: Region, b: Region, layers: range, ours: np.ndarray, theirs: np.ndarray, part: Slice, count: int
) -> np.ndarray:
    whole = part.heads == a.heads == b.heads
    if whole and count < a.page_size:
        starts, sizes = np.array(a.parts(count), dtype=np.int64).T
        starts_a = (ours[:, None] * a.page_bytes + starts).ravel()
        starts_b = (theirs[:, None] * b.page_bytes + starts).ravel()
        lengths = np.tile(sizes, len(ours))
    elif whole:
        first = np.flatnonzero(np.concatenate(([True], (np.diff(ours) != 1) | (np.diff(theirs) != 1))))
        counts = np.diff(np.append(first, len(ours)))
        starts_a, starts_b = ours[first] * a.page_bytes, theirs[first] * b.page_bytes
        lengths = counts * a.page_bytes
    else:
        tokens = np.arange(count, dtype=np.int64)
        starts_a = (ours[:, None] * a.page_bytes + tokens * a.token_bytes).ravel() + part.source_head * a.head_bytes
        starts_b = (theirs[:, None] * b.page_bytes + tokens * b.token_bytes).ravel() + part.target_head * b.head_bytes
        lengths = np.full(len(starts_a), part.heads * a.head_bytes, dtype=np.int64)
    layer = np.arange(layers.start, layers.stop, dtype=np.int64)[:, None]
    rows = np.empty((len(layers), len(lengths), 3), dtype=np.int64)
    rows[:, :, 0] = a.offset + layer * a.layer_bytes + starts_a
    rows[:, :, 1] = b.offset + layer * b.layer_bytes + starts_b
    rows[:, :, 2] = lengths
    return rows.reshape(-1, 3)


def _pages(pages: Sequence[int] | np.ndarray, layout: KVLayout, side: str) -> np.ndarray:
    found = np.asarray(pages, dtype=np.int64).reshape(-1)
    if len(found) and not (found.min() >= 1 and found.max() < layout.pages):
        raise PageError(
            f"{side.capitalize()} pages {int(found.min())} … {int(found.max())}; the pool has pages 1 … {layout.pages - 1}."
        )
    return found
