"""Routing, sorting, grouped and small products against the definitions in `kernels.moe`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fluentllm.kernels.block_fp8 import dequantise_rows, dequantise_weight, quantise_rows_reference, quantise_weight
from fluentllm.kernels.moe import LiveRows, Routing, combine_reference, route as plain_route
from fluentllm.kernels.triton import moe
from fluentllm.kernels.triton.moe import experts, fp8_experts
from fluentllm.kernels.triton.moe_pack import pack
from fluentllm.kernels.triton.moe_persistent import tile_rows
from fluentllm.kernels.triton.moe_route import route
from fluentllm.kernels.triton.moe_sort import sort_by_expert
from fluentllm.kernels.triton.moe_tiles import Tile, tile_for
from fluentllm.kernels.triton.normed import NormAfter

ROUTINGS = [
    Routing(experts=8, top_k=2),
    Routing(experts=12, top_k=4, zero_experts=6, scale=6.0),
    Routing(experts=32, top_k=4, scores="sigmoid", groups=4, top_groups=2, group_score="top2", renormalise=True, scale=2.5),
    Routing(experts=24, top_k=3, groups=6, top_groups=3, group_score="max", scale=16.0),
    Routing(experts=160, top_k=6, scores="sigmoid"),
    Routing(experts=16, top_k=3, scale=2.0, shared=2),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_route(routing: Routing, with_bias: bool, device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randn(7, routing.total, generator=rng)
    bias = torch.randn(routing.total, generator=rng) * 0.1 if with_bias else None
    expected_weights, expected = plain_route(logits, routing, bias)
    weights, ids = route(logits.to(device), routing, None if bias is None else bias.to(device))
    assert torch.equal(ids.cpu().long(), expected)
    assert_close(weights.cpu(), expected_weights)
    assert route(logits[:0].to(device), routing)[1].shape == (0, routing.each)


def move(live: LiveRows, device: torch.device) -> LiveRows:
    picked = None if live.picked is None else live.picked.to(device)
    return replace(live, kv_rows=live.kv_rows.to(device), picked=picked)


@pytest.mark.parametrize("alive", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_route_of_tokens_that_nobody_needs(
    routing: Routing, picks: bool, alive: float, device: torch.device, rng: torch.Generator
) -> None:
    """Their logits may be anything."""
    tokens, rows, page = 9, 20 if picks else 9, 16
    needed = torch.rand(rows, generator=rng) < alive
    kv_rows = torch.randint(0, page, (rows,), generator=rng) + page * needed * torch.randint(1, 99, (rows,), generator=rng)
    live = LiveRows(kv_rows, page, torch.randint(0, rows, (tokens,), generator=rng) if picks else None)
    logits = torch.randn(tokens, routing.total, generator=rng)
    everyone_weights, everyone = route(logits.to(device), routing)
    logits[live.inert()] = float("nan")
    expected_weights, expected = plain_route(logits, routing, None, live)
    weights, ids = route(logits.to(device), routing, None, move(live, device))
    assert torch.equal(ids.cpu().long(), expected)
    assert_close(weights.cpu(), expected_weights)
    inert = live.inert()
    assert (expected[inert] >= routing.experts + routing.shared).all()
    assert not weights.cpu()[inert].any()
    assert torch.equal(ids.cpu()[~inert], everyone.cpu()[~inert])
    assert torch.equal(weights.cpu()[~inert], everyone_weights.cpu()[~inert])


def test_nan_logits_choose_experts_that_exist(device: torch.device) -> None:
    _, ids = route(torch.full((2, 12), float("nan"), device=device), Routing(experts=12, top_k=3))
    assert ((ids >= 0) & (ids < 12)).all()


@pytest.mark.parametrize("liked", [None, 2, 7])
@pytest.mark.parametrize(("tokens", "top_k", "rows"), [(1, 2, 16), (40, 3, 16), (400, 4, 64), (700, 7, 16)])
def test_sort(tokens: int, top_k: int, rows: int, liked: int | None, device: torch.device, rng: torch.Generator) -> None:
    """`liked`: chosen nine times out of ten, a zero expert too: more tiles for one expert, or for nobody, than are written
    together; the last size is more pairs than are looked at together."""
    count, zero = 6, 2
    ids = torch.randint(0, count + zero, (tokens, top_k), generator=rng, dtype=torch.int32)
    if liked is not None:
        ids[torch.rand(tokens, top_k, generator=rng) < 0.9] = liked
    tiles = sort_by_expert(ids.to(device), count, rows)
    flat = ids.flatten().long()
    computed = int((flat < count).sum())
    assert torch.equal(tiles.order[:computed].cpu().long(), flat.argsort(stable=True)[:computed])
    counts = flat.bincount(minlength=count + zero)[:count]
    assert tiles.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    wanted = [(e, int(counts[:e].sum()) + i) for e in range(count) for i in range(0, int(counts[e]), rows)]
    used = len(wanted)
    assert list(zip(tiles.experts[:used].tolist(), tiles.firsts[:used].tolist(), strict=True)) == wanted
    assert tiles.experts[used:].tolist() == [-1] * (tiles.experts.shape[0] - used)
    assert tiles.used.tolist() == [used]


def test_pack(device: torch.device, rng: torch.Generator) -> None:
    """Rows of a larger matrix, a zero expert, more blocks than a program has, the last one not full."""
    count, top_k, columns = 3, 2, 9 * 128 + 40
    x = (torch.randn(11, columns + 8, generator=rng) * 50).to(torch.bfloat16).to(device)[:, 8:]
    ids = torch.randint(0, count + 1, (11, top_k), generator=rng, dtype=torch.int32).to(device)
    tiles = sort_by_expert(ids, count, 16)
    q, scale = pack(x, tiles, top_k)
    computed = int(tiles.offsets[-1])
    assert 0 < computed < ids.numel()
    expected, expected_scale = quantise_rows_reference(x[tiles.order[:computed].long() // top_k])
    assert q.shape == (ids.numel(), columns)
    assert torch.equal(scale[:, :computed], expected_scale)
    # The interpreter's cast to E4M3 loses a carry now and then.
    wrong = q[:computed].float() != expected.float()
    assert wrong.float().mean() < (0.05 if device.type == "cpu" else 1e-9)


def test_pack_of_no_tokens(device: torch.device) -> None:
    ids = torch.zeros(0, 2, dtype=torch.int32, device=device)
    q, scale = pack(torch.zeros(0, 256, device=device), sort_by_expert(ids, 3, 16), 2)
    assert q.shape == (0, 256)
    assert scale.shape == (2, 0)


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "shared", "tile"),
    [
        (1, 520, 8, True, None),
        (1, 8, 520, False, None),
        (2, 24, 12, True, None),
        (3, 48, 40, False, None),
        (21, 64, 32, True, Tile(16, 32, 32, 4, 2)),
        (9, 40, 70, False, Tile(64, 64, 64, 4, 2)),
        (13, 64, 40, True, Tile(8, 32, 32, 4, 3, swapped=True)),
        (30, 40, 72, False, Tile(16, 64, 64, 4, 2, swapped=True, tma=False)),
    ],
)
def test_experts(
    tokens: int, hidden: int, inner: int, shared: bool, tile: Tile | None, device: torch.device, rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    count, top_k = 5, 3
    if tile is not None:
        monkeypatch.setattr(moe, "tile_for", lambda *_: tile)
    x = torch.randn(tokens, hidden, generator=rng)
    gate_up = torch.randn(count, 2 * inner, hidden, generator=rng) * hidden**-0.5
    down = torch.randn(count, hidden, inner, generator=rng) * inner**-0.5
    weights = torch.rand(tokens, top_k, generator=rng)
    ids = torch.stack([torch.randperm(count + 2, generator=rng)[:top_k] for _ in range(tokens)]).int()
    extra = torch.randn(tokens, hidden, generator=rng) if shared else None
    expected = combine_reference(x, weights, ids, gate_up, down)
    if extra is not None:
        expected = expected + extra
    operands = [None if t is None else t.to(device) for t in (x, weights, ids, gate_up, down, extra)]
    out = experts(*operands)
    assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
    # The same, left to the residual stream and the norm behind it.
    norm, stream = torch.rand(hidden, generator=rng) + 0.5, torch.randn(tokens, hidden, generator=rng)
    summed = stream + expected
    after = NormAfter(norm.to(device), 1e-5, stream.to(device))
    normed = experts(*operands, after=after)
    assert_close(after.residual.cpu(), summed, rtol=1e-4, atol=1e-4)
    rows = summed * torch.rsqrt((summed * summed).mean(1, keepdim=True) + 1e-5) * norm
    assert_close(normed.tensor().cpu(), rows, rtol=1e-4, atol=1e-4)


def test_no_tokens(device: torch.device) -> None:
    x = torch.zeros(0, 16, device=device)
    ids = torch.zeros(0, 2, dtype=torch.int32, device=device)
    assert experts(x, ids.float(), ids, torch.zeros(3, 8, 16, device=device), torch.zeros(3, 16, 4, device=device)).shape == (
        0,
        16,
    )


def test_halves(device: torch.device, rng: torch.Generator) -> None:
    x, gate_up, down = (
        torch.randn(*shape, generator=rng).to(torch.bfloat16) * 0.2 for shape in ((4, 64), (3, 64, 64), (3, 64, 32))
    )
    weights, ids = torch.rand(4, 2, generator=rng), torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]], dtype=torch.int32)
    out = experts(*(t.to(device) for t in (x, weights, ids, gate_up, down)))
    assert_close(out.cpu().float(), combine_reference(x, weights, ids, gate_up, down), rtol=0.03, atol=0.01)
    assert tile_for(8, 3).rows == 16


@pytest.mark.parametrize(("tokens", "tile"), [(1, None), (9, Tile(8, 64, 128, 4, 3, swapped=True)), (0, None)])
def test_fp8_experts(
    tokens: int, tile: Tile | None, device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, inner, count, top_k = 256, 128, 5, 3
    if tile is not None:
        monkeypatch.setattr(moe, "tile_for", lambda *_: tile)
    x = torch.randn(tokens, hidden, generator=rng)
    gate_up, gate_up_scale = _blocks(count, 2 * inner, hidden, rng)
    down, down_scale = _blocks(count, hidden, inner, rng)
    weights = torch.rand(tokens, top_k, generator=rng)
    ids = torch.randint(0, count + 2, (tokens, top_k), generator=rng, dtype=torch.int32)
    matrices = [torch.stack([dequantise_weight(*pair) for pair in zip(*both, strict=True)])
                for both in ((gate_up, gate_up_scale), (down, down_scale))]  # fmt: skip
    expected = combine_reference(dequantise_rows(*quantise_rows_reference(x)), weights, ids, *matrices)
    zero = (weights * (ids >= count)).sum(1, keepdim=True)
    expected += zero * (x - dequantise_rows(*quantise_rows_reference(x)))  # zero experts return what was not quantised
    gate_up, gate_up_scale, down, down_scale = (t.to(device) for t in (gate_up, gate_up_scale, down, down_scale))
    out = fp8_experts(*(t.to(device) for t in (x, weights, ids)), (gate_up, gate_up_scale), (down, down_scale))
    error = (out.cpu().float() - expected).norm() / expected.norm().clamp_min(1e-9)
    # What quantising the second product's activations costs, which the reference does not do; the interpreter's cast to E4M3
    # loses a carry now and then.
    assert error < (0.25 if device.type == "cpu" else 0.05)


FORMS = [
    (2, None, False),
    (9, Tile(16, 32, 32, 4, 2), False),
    (9, Tile(8, 32, 32, 4, 3, swapped=True), False),
    (9, Tile(16, 64, 64, 4, 2, swapped=True, tma=False), False),
    (9, Tile(8, 64, 128, 4, 3, swapped=True), True),
]


@pytest.mark.parametrize("alive", [0.0, 0.5])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("tokens", "tile", "fp8"), FORMS)
def test_experts_of_tokens_that_nobody_needs(
    tokens: int, tile: Tile | None, fp8: bool, shared: int, alive: float, device: torch.device, rng: torch.Generator,
    ordered_dots: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They get what is added to all, and the others the bits that they get beside them. `shared`: experts among the routed."""
    routing = Routing(experts=5, top_k=3, zero_experts=0 if shared else 2, shared=shared)
    count = routing.experts + shared
    hidden, inner = (256, 128) if fp8 else (40, 24)
    if tile is not None:
        monkeypatch.setattr(moe, "tile_for", lambda *_: tile)
    x, extra = (torch.randn(tokens, hidden, generator=rng).to(device) for _ in range(2))
    logits = torch.randn(tokens, routing.total, generator=rng).to(device)
    needed = torch.rand(tokens, generator=rng) < alive
    live = LiveRows((16 * needed).to(device), 16)
    if fp8:
        matrices = tuple(
            tuple(t.to(device) for t in _blocks(count, *shape, rng)) for shape in ((2 * inner, hidden), (hidden, inner))
        )
    else:
        matrices = tuple(
            (torch.randn(count, *shape, generator=rng) * 0.1).to(device) for shape in ((2 * inner, hidden), (hidden, inner))
        )
    product = fp8_experts if fp8 else experts
    everyone = product(x, *route(logits, routing), *matrices, extra).cpu()
    out = product(x, *route(logits, routing, None, live), *matrices, extra).cpu()
    assert torch.equal(out[needed], everyone[needed])
    assert torch.equal(out[~needed], extra.cpu()[~needed])
    after = NormAfter(torch.ones(hidden, device=device), 1e-5, torch.zeros(tokens, hidden, device=device))
    product(x, *route(logits, routing, None, live), *matrices, extra, after=after)
    assert torch.equal(after.residual.cpu(), out)


def _blocks(count: int, rows: int, columns: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [quantise_weight(torch.randn(rows, columns, generator=rng) * columns**-0.5) for _ in range(count)]
    return torch.stack([q for q, _ in pairs]), torch.stack([s for _, s in pairs])


def test_tiles_follow_the_pairs_of_an_expert() -> None:
    assert [tile_rows(pairs, 64) for pairs in (6, 64 * 6, 64 * 7, 64 * 17, 64 * 900)] == [16, 16, 32, 64, 64]
