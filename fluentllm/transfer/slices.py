"""Which rank sends which heads to whom, where prefill and decode are spread over different numbers of GPUs.

Ranks hold KV heads as tensor parallelism leaves them: with at most as many ranks as heads, rank r has the heads
[r · heads / size, (r + 1) · heads / size); with more, each head is on size / heads neighbouring ranks. MLA's latent is whole on
every rank. Pure functions; the reference in the tests copies the plain way.
"""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct

from .layout import KVLayout, LayoutMismatch, check_compatible


class Slice(Struct, frozen=True, order=True):
    """`source` writes `heads` heads, of every token, into `target`'s pool."""

    source: int
    """Rank on the sending side."""
    target: int
    source_head: int
    """First head, counted in the source's own pool."""
    target_head: int
    """Where it goes in the target's own pool."""
    heads: int


def heads_of(heads: int, size: int, rank: int) -> range:
    """Heads of the model that the rank holds."""
    if size <= heads:
        each = heads // size
        return range(rank * each, (rank + 1) * each)
    head = rank * heads // size
    return range(head, head + 1)


def plan_slices(heads: int, source_size: int, target_size: int) -> list[Slice]:
    """Every target rank gets each of its heads once. Where several source ranks have a head, the targets that want it take
    turns among them. heads = 1 with any sizes is also MLA's plan: each target gets the latent from one source.

    Raises `LayoutMismatch` where heads cannot be spread evenly.
    """
    for size in (source_size, target_size):
        if size < 1 or heads < 1 or (heads % size and size % heads):
            raise LayoutMismatch(
                f"{heads} KV heads cannot be spread evenly over {size} ranks.",
                fix="Choose a tensor-parallel size that divides the KV heads, or is a multiple of them.",
            )
    copies = max(1, source_size // heads)
    wanted = dict.fromkeys(range(heads), 0)
    slices = []
    for target in range(target_size):
        has = heads_of(heads, target_size, target)
        head = has.start
        while head < has.stop:
            first = head * source_size // heads
            source = first + wanted[head] % copies
            owned = heads_of(heads, source_size, source)
            count = min(owned.stop, has.stop) - head
            slices.append(Slice(source, target, head - owned.start, head - has.start, count))
            wanted[head] += 1
            head += count
    return slices


def slices_between(source: KVLayout, target: KVLayout) -> list[Slice]:
    """The plan for two sides, given the layout of any rank of each; MLA counts as one head. Raises `LayoutMismatch`."""
    check_compatible(source, target)
    return plan_slices(source.heads if source.kind == "gqa" else 1, source.tp_size, target.tp_size)


@lru_cache(256)
def slices_of(source: KVLayout, target: KVLayout) -> tuple[Slice, ...]:
    """What of it these two ranks move."""
    return tuple(
        item for item in slices_between(source, target) if (item.source, item.target) == (source.tp_rank, target.tp_rank)
    )


@lru_cache(256)
def sources_of(source: KVLayout, target: KVLayout) -> tuple[int, ...]:
    """Ranks of the source, given the layout of any, that write to this rank of the target. The first also brings what
    proposers keep for each page, which every rank has whole."""
    return tuple(sorted({item.source for item in slices_between(source, target) if item.target == target.tp_rank}))


@lru_cache(256)
def targets_of(source: KVLayout, target: KVLayout) -> tuple[int, ...]:
    """Ranks of the target, given the layout of any, that this rank of the source writes to."""
    return tuple(sorted({item.target for item in slices_between(source, target) if item.source == source.tp_rank}))
