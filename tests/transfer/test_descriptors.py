"""Pages and layers to writes: the same bytes as page by page, in as few writes as can be, and quickly."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fluentllm.core.kv.pool import KVPool
from fluentllm.core.types import KVSpec
from fluentllm.kernels.mla_decode import fp8_planes
from fluentllm.transfer.descriptors import PageError, plan_state_writes, plan_writes
from fluentllm.transfer.layout import KVLayout, layout_of

SOURCE = KVLayout(model="m", kind="gqa", dtype="uint8", page_size=2, pages=12, layers=4, heads=2, head_dim=3, v_head_dim=1)
TARGET = msgspec.structs.replace(SOURCE, pages=10)


def page_by_page(
    source: KVLayout, target: KVLayout, layers: range, ours: list[int], theirs: list[int], tokens: int | None = None
) -> set[tuple[int, int]]:
    """(local, remote) of every byte, one page, layer and tensor after another."""
    found = set()
    for a, b in zip(source.tensors(), target.tensors(), strict=True):
        for layer in layers:
            for mine, other in zip(ours, theirs, strict=True):
                start = a.offset + layer * a.layer_bytes + mine * a.page_bytes
                end = b.offset + layer * b.layer_bytes + other * b.page_bytes
                found |= {(start + byte, end + byte) for byte in range((tokens or a.page_size) * a.token_bytes)}
    return found


def as_bytes(rows: np.ndarray) -> list[tuple[int, int]]:
    return [(start + byte, end + byte) for start, end, length in rows.tolist() for byte in range(length)]


@given(
    pages=st.integers(0, 9).flatmap(
        lambda count: st.tuples(
            st.permutations(range(1, SOURCE.pages)).map(lambda p: p[:count]),
            st.permutations(range(1, TARGET.pages)).map(lambda p: p[:count]),
        )
    ),
    layers=st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: range(min(pair), max(pair))),
    tokens=st.sampled_from([None, 1, 2]),
)
def test_the_same_bytes_as_page_by_page(pages: tuple[list[int], list[int]], layers: range, tokens: int | None) -> None:
    ours, theirs = pages
    found = as_bytes(plan_writes(SOURCE, TARGET, layers, ours, theirs, tokens=tokens))
    assert len(found) == len(set(found)), "a byte is written twice"
    assert set(found) == page_by_page(SOURCE, TARGET, layers, ours, theirs, tokens)


@pytest.mark.parametrize("tokens", [1, 5, 15, 16, None])
def test_tokens_of_planes_arrive_and_no_others(tokens: int | None) -> None:
    """An FP8 cache of MLA: what is written is copied byte by byte, then both pools are read as kernels read them."""
    spec = KVSpec(kind="mla", layers=3, latent_dim=24, rope_dim=8)
    pools = [KVPool(spec, pages, 16, torch.float8_e4m3fn, torch.device("cpu")) for pages in (7, 5)]
    ours, theirs = [6, 2, 3], [1, 4, 5]
    for pool in pools:
        pool.latent.random_()
    memory = [pool.latent.view(-1).numpy() for pool in pools]
    before = pools[1].latent.clone()
    rows = plan_writes(layout_of(pools[0], "m"), layout_of(pools[1], "m"), range(1, 3), ours, theirs, tokens=tokens)
    assert rows[:, 2].sum() == 2 * 3 * (tokens or 16) * (24 + 4 + 16)
    for start, end, length in rows.tolist():
        memory[1][end : end + length] = memory[0][start : start + length]
    count = tokens or 16
    for layer in range(3):
        sent, found, old = (fp8_planes(pool[layer], 24, 8) for pool in (pools[0].latent, pools[1].latent, before))
        for plane in ("latent", "scale", "rope"):
            a, b, c = (
                getattr(planes, plane).contiguous().view(torch.uint8).unflatten(1, (16, -1)) if plane == "scale"
                else getattr(planes, plane).view(torch.uint8)
                for planes in (sent, found, old)
            )  # fmt: skip
            expected = c.clone()
            if layer:
                expected[theirs, :count] = a[ours, :count]
            assert torch.equal(b, expected)


def test_states_of_pages_lie_behind_the_pool() -> None:
    source, target = (msgspec.structs.replace(layout, page_states=(5, 3)) for layout in (SOURCE, TARGET))
    rows = plan_state_writes(source, target, [3, 4, 9], [1, 2, 7])
    behind = source.pages * source.bytes_per_page(), target.pages * target.bytes_per_page()
    expected = []
    for width, ours, theirs in ((5, *behind), (3, behind[0] + 5 * source.pages, behind[1] + 5 * target.pages)):
        expected += [[ours + 3 * width, theirs + width, 2 * width], [ours + 9 * width, theirs + 7 * width, width]]
    assert rows.tolist() == expected
    assert plan_state_writes(SOURCE, TARGET, [3], [1]).shape == (0, 3)
    assert source.bytes_of(5) == 5 * source.bytes_per_page() // 2 + 3 * 8


def test_contiguous_pages_are_one_write() -> None:
    rows = plan_writes(SOURCE, TARGET, range(1, 3), [3, 4, 5, 9], [1, 2, 3, 4])
    key, value = SOURCE.tensors()
    assert rows[:, 2].tolist() == [3 * key.page_bytes, key.page_bytes] * 2 + [3 * value.page_bytes, value.page_bytes] * 2


def test_pages_in_falling_order_are_merged_too() -> None:
    assert len(plan_writes(SOURCE, TARGET, range(1), [5, 4, 3], [9, 8, 7])) == 2
    assert len(plan_writes(SOURCE, TARGET, range(1), [5, 4, 3], [7, 8, 9])) == 6


@pytest.mark.parametrize(
    ("layers", "ours", "theirs"),
    [
        *((range(1), [0], [1]), (range(1), [1], [0]), (range(1), [12], [1]), (range(1), [1], [10])),
        *((range(1), [1, 2], [1]), (range(1), [1, 2], [3, 3]), (range(3, 5), [1], [1]), (range(-1, 1), [1], [1])),
    ],
)
def test_pages_and_layers_outside_are_refused(layers: range, ours: list[int], theirs: list[int]) -> None:
    """Page 0 is scratch: it belongs to nobody."""
    with pytest.raises(PageError):
        plan_writes(SOURCE, TARGET, layers, ours, theirs)


def test_one_page_may_be_sent_to_two() -> None:
    assert len(as_bytes(plan_writes(SOURCE, TARGET, range(1), [3, 3], [1, 2]))) == 2 * SOURCE.bytes_per_page() // 4


def test_thousands_of_pages_take_milliseconds() -> None:
    """61 layers of MLA, 4,096 scattered pages: 250,000 writes."""
    big = KVLayout(model="m", kind="mla", dtype="bfloat16", page_size=64, pages=9000, layers=61, latent_dim=512, rope_dim=64)
    rng = np.random.default_rng(0)
    ours, theirs = rng.permutation(8999)[:4096] + 1, rng.permutation(8999)[:4096] + 1

    def once(layers: range) -> float:
        started = time.thread_time()
        rows = plan_writes(big, big, layers, ours, theirs)
        assert rows[:, 2].sum() == 4096 * len(layers) * 64 * 576 * 2
        return time.thread_time() - started

    assert min(once(range(61)) for _ in range(5)) < 0.2
    assert min(once(range(4, 8)) for _ in range(5)) < 0.02
