"""Who sends what to whom: every pair of sizes, simulated on memory and compared with resharding the plain way."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import numpy as np
import pytest

from fluentllm.transfer.descriptors import plan_writes
from fluentllm.transfer.layout import KVLayout, LayoutMismatch
from fluentllm.transfer.slices import heads_of, plan_slices, slices_between

SIZES = (1, 2, 4, 8)
LAYERS, PAGE_SIZE = 3, 4


def layout(heads: int, size: int, rank: int, pages: int) -> KVLayout:
    """MLA where there are no heads."""
    kind = {"kind": "gqa", "heads": heads, "head_dim": 3, "v_head_dim": 2} if heads else {"kind": "mla", "latent_dim": 5}
    return KVLayout(
        model="m", dtype="uint8", page_size=PAGE_SIZE, pages=pages, layers=LAYERS, tp_size=size, tp_rank=rank, **kind
    )


def shard(model: list[np.ndarray], heads: int, size: int, rank: int) -> np.ndarray:
    """A rank's registered memory: its heads of each tensor [layers, pages, page_size, heads, bytes], one after another."""
    mine = heads_of(heads, size, rank) if heads else range(1)
    return np.concatenate([tensor[:, :, :, mine.start : mine.stop].ravel() for tensor in model])


def random_model(rng: np.random.Generator, heads: int, pages: int) -> list[np.ndarray]:
    widths = (3, 2) if heads else (5,)
    return [rng.integers(0, 256, (LAYERS, pages, PAGE_SIZE, heads or 1, width), dtype=np.uint8) for width in widths]


@pytest.mark.parametrize("heads", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize(("source_size", "target_size"), list(itertools.product(SIZES, SIZES)))
def test_copies_equal_the_plain_reshard(heads: int, source_size: int, target_size: int) -> None:
    rng = np.random.default_rng([heads, source_size, target_size])
    source_pages, target_pages = 7, 9
    source_model, target_model = random_model(rng, heads, source_pages), random_model(rng, heads, target_pages)
    sources = [shard(source_model, heads, source_size, rank) for rank in range(source_size)]
    targets = [shard(target_model, heads, target_size, rank) for rank in range(target_size)]
    ours = rng.permutation(np.arange(1, source_pages))[:4]
    theirs = rng.permutation(np.arange(1, target_pages))[:4]
    written = [np.zeros(len(target), dtype=np.int64) for target in targets]
    groups = (range(0, 2), range(2, LAYERS))
    plan = slices_between(layout(heads, source_size, 0, source_pages), layout(heads, target_size, 0, target_pages))
    for part, layers in itertools.product(plan, groups):
        rows = plan_writes(
            layout(heads, source_size, part.source, source_pages),
            layout(heads, target_size, part.target, target_pages),
            layers,
            ours,
            theirs,
            part,
        )
        for start, offset, length in rows.tolist():
            targets[part.target][offset : offset + length] = sources[part.source][start : start + length]
            written[part.target][offset : offset + length] += 1
    for tensor, other in zip(target_model, source_model, strict=True):
        tensor[:, theirs] = other[:, ours]
    for rank in range(target_size):
        np.testing.assert_array_equal(targets[rank], shard(target_model, heads, target_size, rank))
        marks = [np.zeros_like(tensor) for tensor in target_model]
        for mark in marks:
            mark[:, theirs] = 1
        np.testing.assert_array_equal(written[rank], shard(marks, heads, target_size, rank))  # each byte exactly once


@pytest.mark.parametrize(("source_size", "target_size"), list(itertools.product(SIZES, SIZES)))
def test_senders_share_the_work(source_size: int, target_size: int) -> None:
    """No source sends more than one slice more than another, and MLA's latent goes to each target once."""
    latent = plan_slices(1, source_size, target_size)
    assert sorted(part.target for part in latent) == list(range(target_size))
    loads = Counter(part.source for part in latent)
    assert max(loads.values()) - min(loads.get(rank, 0) for rank in range(source_size)) <= 1
    for heads in (1, 2, 4, 8):
        sent = Counter(dict.fromkeys(range(source_size), 0))
        for part in plan_slices(heads, source_size, target_size):
            sent[part.source] += part.heads
        assert max(sent.values()) - min(sent.values()) <= 1


def test_equal_sizes_send_whole_pools_straight_across() -> None:
    for size in SIZES:
        assert [(part.source, part.target) for part in plan_slices(8, size, size)] == [(r, r) for r in range(size)]
        assert {(part.source_head, part.target_head, part.heads) for part in plan_slices(8, size, size)} == {(0, 0, 8 // size)}


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (2, 6), (0, 1)])
def test_uneven_heads_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(LayoutMismatch, match="cannot be spread evenly"):
        plan_slices(4, *sizes)


def test_other_models_are_refused_before_anything_is_planned() -> None:
    one = layout(4, 1, 0, 5)
    with pytest.raises(LayoutMismatch, match="differs in model"):
        slices_between(one, msgspec.structs.replace(one, model="other"))
