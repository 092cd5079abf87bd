"""Decode attention over paged KV: ragged lengths, several query rows, every split of the keys."""

from __future__ import annotations

import random

import pytest
import torch
from paged import Paged, random_paged

from fluentllm.kernels.attention_reference import gqa_reference
from fluentllm.kernels.triton import gqa_decode as decode_module, gqa_plan
from fluentllm.kernels.triton.gqa_decode import gqa_decode, query_tiles
from fluentllm.kernels.triton.gqa_plan import gqa_plan_reference, plan_gqa
from fluentllm.kernels.triton.kv_append import rotate_and_append
from fluentllm.kernels.triton.launch import recording
from fluentllm.kernels.triton.qkv_product import QkvProduct, from_product_fits

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}


def expected(q: torch.Tensor, paged: Paged, rows: int, scale: float) -> torch.Tensor:
    parts = []
    for i, length in enumerate(paged.lengths.tolist()):
        positions = torch.arange(length - rows, length)
        k, v = paged.keys(i)
        if length:
            parts.append(gqa_reference(q[i * rows : (i + 1) * rows].double(), k, v, positions, scale))
        else:
            parts.append(q.new_zeros(rows, q.shape[1], v.shape[-1], dtype=torch.float64))
    return torch.cat(parts)


@pytest.mark.parametrize("parts", [1, 4, 24])
@pytest.mark.parametrize("lengths", [[1], [700], [1, 65, 1300, 0, 256, 257], [1024] * 3, [2048] * 17, [1600, *[100] * 9]])
def test_plan_is_the_reference(lengths: list[int], parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gqa_plan, "multiprocessors", lambda _: parts)
    monkeypatch.setattr(gqa_plan, "PER_MULTIPROCESSOR", 1)
    plan = plan_gqa(torch.tensor(lengths, dtype=torch.int32, device=device), kv_heads=1, longest=2048)
    items, starts, spans = gqa_plan_reference(lengths, plan.items.shape[0], parts)
    assert (plan.items.tolist(), plan.starts.tolist(), plan.spans.tolist()) == (items, starts, spans)
    for i, length in enumerate(lengths):
        runs = starts[i + 1] - starts[i]
        assert (runs - 1) * spans[i] < max(length, 1)
        assert runs * spans[i] >= length


def test_sequences_stay_whole_where_halves_would_need_two_turns() -> None:
    """Equal shares of 32 × 4,096 keys among 33 places are a little less than a sequence: nobody is cut for it. Where one turn
    cannot be had, two are made even: 40 whole ones would leave 26 places idle."""
    assert gqa_plan_reference([4096] * 32, 64, 33)[1] == list(range(33))
    assert gqa_plan_reference([4096] * 40, 106, 33)[1] == list(range(0, 82, 2))


@pytest.mark.parametrize("parts", [1, 4, 33, 264])
def test_no_plan_has_more_items_than_were_asked_for(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gqa_plan, "multiprocessors", lambda _: parts)
    monkeypatch.setattr(gqa_plan, "PER_MULTIPROCESSOR", 1)
    rng = random.Random(parts)
    for _ in range(300):
        lengths = [rng.choice((0, 1, rng.randint(1, 300), rng.randint(1, 100_000))) for _ in range(rng.randint(1, 100))]
        with recording():  # without a launch
            room = plan_gqa(torch.tensor(lengths, dtype=torch.int32), kv_heads=1, longest=100_000).items.shape[0]
        assert gqa_plan_reference(lengths, room, parts)[1][-1] <= room, lengths


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rows", "page_size", "dtype"),
    [
        (4, 2, 64, 1, 16, torch.float32),
        (8, 1, 128, 3, 64, torch.bfloat16),
        (6, 2, 96, 8, 32, torch.float16),
        (2, 2, 256, 2, 64, torch.bfloat16),
        (24, 1, 64, 5, 16, torch.float32),
    ],
)
def test_ragged_batch(
    heads: int,
    kv_heads: int,
    dim: int,
    rows: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
) -> None:
    lengths = [rows, 520, 64]
    paged = random_paged(lengths, rng, device, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype)
    q = torch.randn(len(lengths) * rows, heads, dim, generator=rng).to(device, dtype)
    _, tiles = query_tiles(rows, heads // kv_heads)
    for inside in (False, True):
        plan = plan_gqa(paged.lengths, kv_heads=kv_heads, longest=1024, tiles=tiles, inside=inside)
        assert plan.starts.tolist()[-1] > len(lengths)  # something was merged
        assert (plan.counters is not None) == inside
        for _ in range(1 + inside):  # the counters must be left as they were found
            out = gqa_decode(q, paged.k, paged.v, paged.table, paged.lengths, plan, rows, dim**-0.5)
            torch.testing.assert_close(out.double(), expected(q, paged, rows, dim**-0.5), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rows", "page_size", "dtype", "kv_dtype", "rotary", "interleaved"),
    [
        (4, 2, 64, 1, 16, torch.float32, torch.float32, 64, False),
        (8, 1, 128, 3, 64, torch.bfloat16, torch.bfloat16, 128, False),
        (8, 4, 64, 8, 16, torch.bfloat16, torch.bfloat16, 32, True),
        (24, 1, 64, 5, 16, torch.float32, torch.float32, 64, False),
        (4, 2, 128, 2, 64, torch.bfloat16, torch.float8_e4m3fn, 128, False),
    ],
)
def test_from_the_product_is_append_then_decode(
    norm: bool, heads: int, kv_heads: int, dim: int, rows: int, page_size: int, dtype: torch.dtype, kv_dtype: torch.dtype,
    rotary: int, interleaved: bool, device: torch.device, rng: torch.Generator,
) -> None:  # fmt: skip
    # New tokens at the start of a sequence, across a border of runs, and in a sequence that is empty (an inert slot).
    lengths = [rows, 512 + rows // 2, 0, 64]
    paged = random_paged(lengths, rng, device, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype)
    pages = [[part.to(kv_dtype).clone() for part in (paged.k, paged.v)] for _ in range(2)]
    tokens = len(lengths) * rows
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=rng).to(device, dtype)
    cos, sin = (torch.randn(tokens, 1, rotary, generator=rng).to(device, dtype) for _ in range(2))
    weights = [(torch.rand(dim, generator=rng) + 0.5).to(device, dtype) if norm else None for _ in range(2)]
    at = []
    for i, length in enumerate(lengths):
        for position in range(length - rows, length):
            page = int(paged.table[i, position // page_size]) if length else 0
            at.append(page * page_size + position % page_size if length else 0)
    kv_rows = torch.tensor(at, device=device)
    named = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-6, "interleaved": interleaved}
    plan = plan_gqa(paged.lengths, kv_heads=kv_heads, longest=1024, tiles=query_tiles(rows, heads // kv_heads)[1])
    flat = [part.view(-1, kv_heads, dim) for part in pages[0]]
    q = rotate_and_append(qkv, cos, sin, kv_rows, *flat, heads, **named)
    wanted = gqa_decode(q, *pages[0], paged.table, paged.lengths, plan, rows, dim**-0.5)
    product = QkvProduct(qkv, cos, sin, kv_rows, heads, **named)
    found = gqa_decode(product, *pages[1], paged.table, paged.lengths, plan, rows, dim**-0.5)
    # The same arithmetic; a compiler may contract it in other places.
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.abs().max()))
    written = kv_rows[kv_rows > 0]
    for one, other in zip(*pages, strict=True):
        ones, others = (part.view(-1, kv_heads, dim)[written].float() for part in (one, other))
        torch.testing.assert_close(others, ones, rtol=0.13 if kv_dtype.itemsize == 1 else 1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("from_product", [False, True])
def test_keys_that_are_held_are_those_that_are_read_later(
    from_product: bool, rows: int, device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block of a run before the wait or in the loop: whole, cut, with some or all of the new tokens, and none."""
    heads, kv_heads, dim = 4, 2, 64
    lengths = [rows, 64, 64 + rows - 1, 300, 0]
    paged = random_paged(lengths, rng, device, kv_heads=kv_heads, dim=dim, page_size=16, dtype=torch.bfloat16)
    tokens = len(lengths) * rows
    q = torch.randn(tokens, heads, dim, generator=rng).to(device, torch.bfloat16)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=rng).to(device, torch.bfloat16)
    cos, sin = (torch.randn(tokens, 1, dim, generator=rng).to(device, torch.bfloat16) for _ in range(2))
    places = [
        int(paged.table[i, position // 16]) * 16 + position % 16 if length else 0
        for i, length in enumerate(lengths)
        for position in range(length - rows, length)
    ]
    given = QkvProduct(qkv, cos, sin, torch.tensor(places, device=device), heads) if from_product else q
    plan = plan_gqa(paged.lengths, kv_heads=kv_heads, longest=512)
    found = []
    for hold in (False, True):
        monkeypatch.setattr(decode_module, "HOLD", hold)
        k, v = paged.k.clone(), paged.v.clone()
        out = gqa_decode(given, k, v, paged.table, paged.lengths, plan, rows, dim**-0.5)
        found.append((out.float(), k[1:], v[1:]))  # page 0 is where the inert sequence's rows go
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2e-2)
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=0, atol=0)


def test_heads_of_two_tiles_cannot_come_from_the_product(device: torch.device) -> None:
    assert from_product_fits(128, 128)
    assert not from_product_fits(96, 96)
    assert not from_product_fits(64, 32)


def test_short_context_needs_no_merge_and_an_empty_sequence_gets_zeros(device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([5, 0, 60], rng, device, kv_heads=1, dim=64)
    q = torch.randn(3, 2, 64, generator=rng).to(device)
    plan = plan_gqa(paged.lengths, kv_heads=1, longest=64)
    assert plan.single
    out = gqa_decode(q, paged.k, paged.v, paged.table, paged.lengths, plan, 1, 0.1)
    torch.testing.assert_close(out.double(), expected(q, paged, 1, 0.1), rtol=0, atol=2e-6)


def test_queries_may_be_a_slice_and_values_narrower(device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([400, 7], rng, device, kv_heads=2, dim=64, value_dim=32)
    q = torch.randn(4, 9, 64, generator=rng).to(device)[:, 2:6]
    plan = plan_gqa(paged.lengths, kv_heads=2, longest=416)
    out = gqa_decode(q, paged.k, paged.v, paged.table, paged.lengths, plan, 2, 0.125)
    torch.testing.assert_close(out.double(), expected(q, paged, 2, 0.125), rtol=0, atol=2e-6)


def test_fixed_spans_give_a_sequence_the_same_bits_in_any_batch(device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([700, 90, 1], rng, device, kv_heads=1, dim=64)
    q = torch.randn(3, 2, 64, generator=rng).to(device)

    def run(count: int) -> torch.Tensor:
        lengths = paged.lengths[:count].contiguous()
        plan = plan_gqa(lengths, kv_heads=1, longest=768, fixed_span=128)
        return gqa_decode(q[:count], paged.k, paged.v, paged.table[:count], lengths, plan, 1, 0.125)

    assert torch.equal(run(3)[:1], run(1))
    torch.testing.assert_close(run(3).double(), expected(q, paged, 1, 0.125), rtol=0, atol=2e-6)


def test_fp8_cache_with_scales(device: torch.device, rng: torch.Generator) -> None:
    paged = random_paged([130, 33], rng, device, kv_heads=1, dim=64)
    k8, v8 = paged.k.to(torch.float8_e4m3fn), paged.v.to(torch.float8_e4m3fn)
    q = torch.randn(2, 4, 64, generator=rng).to(device)
    plan = plan_gqa(paged.lengths, kv_heads=1, longest=160)
    out = gqa_decode(q, k8, v8, paged.table, paged.lengths, plan, 1, 0.125, k_scale=0.5, v_scale=2.0)
    same = Paged(k8.float() * 0.5, v8.float() * 2.0, paged.table, paged.lengths)
    torch.testing.assert_close(out.double(), expected(q, same, 1, 0.125), rtol=0, atol=1e-5)
