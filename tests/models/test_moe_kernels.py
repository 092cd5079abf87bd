"""Routing and expert sums against their plain definitions, on fresh random inputs, ragged and empty ones included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluentllm.kernels.moe import LiveRows, Routing, combine, combine_reference, ordered_sigmoid, route

HIDDEN, INNER = 24, 20


def weights_of(experts: int) -> tuple[Tensor, Tensor]:
    return torch.randn(experts, 2 * INNER, HIDDEN) / 5, torch.randn(experts, HIDDEN, INNER) / 5


def compute(gate_up: Tensor, down: Tensor, called: list[int] | None = None):
    def expert(number: int, rows: Tensor) -> Tensor:
        if called is not None:
            called.append(number)
        gate, up = (rows @ gate_up[number].T).chunk(2, -1)
        return (F.silu(gate) * up) @ down[number].T

    return expert


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 63])
@pytest.mark.parametrize("zero_experts", [0, 5])
def test_combine_is_the_weighted_sum_of_the_chosen_experts(tokens: int, zero_experts: int) -> None:
    routing = Routing(experts=8, top_k=3, zero_experts=zero_experts)
    gate_up, down = weights_of(8)
    x = torch.randn(tokens, HIDDEN)
    weights, ids = route(torch.randn(tokens, routing.total), routing)
    called: list[int] = []
    ours = combine(x, weights, ids, compute(gate_up, down, called), routing)
    torch.testing.assert_close(ours, combine_reference(x, weights, ids, gate_up, down), rtol=1e-5, atol=1e-5)
    assert called == sorted({e for e in ids.flatten().tolist() if e < 8})


def test_all_tokens_on_one_expert_and_all_on_zero_experts() -> None:
    routing = Routing(experts=4, top_k=2, zero_experts=3)
    gate_up, down = weights_of(4)
    x, weights = torch.randn(9, HIDDEN), torch.rand(9, 2)
    same = torch.full((9, 2), 2)
    torch.testing.assert_close(
        combine(x, weights, same, compute(gate_up, down), routing), combine_reference(x, weights, same, gate_up, down)
    )
    zero = torch.randint(4, 7, (9, 2))
    torch.testing.assert_close(combine(x, weights, zero, compute(gate_up, down), routing), weights.sum(1, keepdim=True) * x)


def test_combine_sums_in_float32() -> None:
    routing = Routing(experts=8, top_k=4)
    gate_up, down = weights_of(8)
    x = torch.randn(5, HIDDEN).bfloat16()
    weights, ids = route(torch.randn(5, 8), routing)
    ours = combine(x, weights, ids, lambda e, rows: compute(gate_up, down)(e, rows.float()), routing)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, combine_reference(x, weights, ids, gate_up, down).bfloat16(), rtol=1e-2, atol=1e-3)


def route_reference(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[list[list[float]], list[list[int]]]:
    """One token at a time, in Python."""
    all_weights, all_ids = [], []
    for row in logits:
        scores = (row.softmax(-1) if routing.scores == "softmax" else row.sigmoid()).tolist()
        choice = [s + (bias[e].item() if bias is not None else 0.0) for e, s in enumerate(scores)]
        size = len(choice) // routing.groups
        counted = 1 if routing.group_score == "max" else 2
        best = {g: sum(sorted(choice[g * size : (g + 1) * size])[-counted:]) for g in range(routing.groups)}
        groups = sorted(best, key=lambda g: -best[g])[: routing.top_groups]
        allowed = [e for e in range(len(choice)) if e // size in groups]
        ids = sorted(allowed, key=lambda e: -choice[e])[: routing.top_k]
        total = sum(scores[e] for e in ids) if routing.renormalise else 1.0
        all_weights.append([scores[e] / total * routing.scale for e in ids])
        all_ids.append(ids)
    return all_weights, all_ids


KINDS = {
    "qwen3": Routing(experts=16, top_k=4, renormalise=True),
    "v2_greedy": Routing(experts=16, top_k=4, scale=3.0),
    "v2_groups": Routing(experts=16, top_k=4, groups=4, top_groups=2, scale=16.0),
    "v3": Routing(
        experts=16, top_k=4, scores="sigmoid", groups=4, top_groups=2, group_score="top2", renormalise=True, scale=2.5
    ),
    "longcat": Routing(experts=12, zero_experts=4, top_k=5, scale=6.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_route_against_plain_python(kind: str, tokens: int) -> None:
    routing = KINDS[kind]
    logits = torch.randn(tokens, 16)
    bias = torch.randn(16) / 4 if kind in ("v3", "longcat") else None
    weights, ids = route(logits, routing, bias)
    expected_weights, expected_ids = route_reference(logits, routing, bias)
    assert ids.tolist() == expected_ids
    torch.testing.assert_close(weights, torch.tensor(expected_weights).view(tokens, routing.top_k))


def test_bias_changes_the_choice_not_the_weight() -> None:
    routing = Routing(experts=4, top_k=1)
    logits = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    weights, ids = route(logits, routing, torch.tensor([0.0, 0.0, 10.0, 0.0]))
    assert ids.tolist() == [[2]]
    assert weights.item() == pytest.approx(logits.softmax(-1)[0, 2].item())


def test_sigmoid() -> None:
    x = torch.cat([torch.randn(1000) * 10, torch.tensor([0.0, 200.0, -200.0])])
    torch.testing.assert_close(ordered_sigmoid(x), x.sigmoid())


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_depend_on_its_batch(kind: str) -> None:
    """Bit for bit: what makes the deterministic mode possible, given experts that have the same property."""
    routing = KINDS[kind]
    logits, bias = torch.randn(64, routing.total), torch.randn(routing.total) / 4
    x = torch.randn(64, HIDDEN)
    gate_up, down = weights_of(routing.experts)

    def row_by_row(number: int, rows: Tensor) -> Tensor:
        one = compute(gate_up, down)
        return torch.stack([one(number, row) for row in rows])

    weights, ids = route(logits, routing, bias)
    out = combine(x, weights, ids, row_by_row, routing)
    for start, stop in [(0, 1), (63, 64), (3, 10), (17, 50)]:
        part_weights, part_ids = route(logits[start:stop], routing, bias)
        assert torch.equal(part_weights, weights[start:stop])
        assert torch.equal(part_ids, ids[start:stop])
        assert torch.equal(combine(x[start:stop], part_weights, part_ids, row_by_row, routing), out[start:stop])


@pytest.mark.parametrize("alive", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [*KINDS, "shared"])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_a_token_that_nobody_needs_has_no_experts(kind: str, alive: float, tokens: int) -> None:
    """Nor is there a call for it; the choices of the others do not change. Tokens are rows of a pass, in any order."""
    routing = KINDS[kind] if kind in KINDS else Routing(experts=14, top_k=4, shared=2)
    count = routing.experts + routing.shared
    kv_rows = torch.where(torch.rand(50) < alive, torch.randint(8, 400, (50,)), torch.randint(0, 8, (50,)))
    picked = torch.randint(0, 50, (tokens,))
    needed = kv_rows[picked] >= 8
    logits, x, (gate_up, down) = torch.randn(tokens, routing.total), torch.randn(tokens, HIDDEN), weights_of(count)
    everyone_weights, everyone = route(logits, routing)
    weights, ids = route(logits, routing, None, LiveRows(kv_rows, 8, picked))
    assert torch.equal(weights, everyone_weights.where(needed.unsqueeze(1), 0.0))
    assert torch.equal(ids[needed], everyone[needed])
    called: list[int] = []
    out = combine(x, weights, ids, compute(gate_up, down, called), routing)
    assert called == sorted({e for e in everyone[needed].flatten().tolist() if e < count})
    assert not out[~needed].any()
    torch.testing.assert_close(out, combine_reference(x, weights, ids, gate_up, down), rtol=1e-5, atol=1e-5)
    alone = LiveRows(kv_rows[picked], 8)
    assert torch.equal(route(logits, routing, None, alone)[1], ids)


def test_routing_is_a_value() -> None:
    assert dataclasses.replace(KINDS["v3"], scale=2.5) == KINDS["v3"]
