"""Norm, rotary and the KV write in one launch, against the layer's own three steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.kv_append import append, flat_heads, rotate_and_append


def rope_tables(length: int, width: int, interleaved: bool, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Laid out as `layers.rotary.Rotary` does, [length, 1, width]."""
    angles = torch.rand(length, width // 2, generator=rng) * 6.3
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        tables = torch.stack((cos, cos), -1).flatten(1), torch.stack((-sin, sin), -1).flatten(1)
    else:
        tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return tables[0].unsqueeze(1), tables[1].unsqueeze(1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "interleaved", "norm"),
    [
        (4, 2, 64, 64, False, False),
        (3, 3, 96, 96, False, True),
        (6, 1, 32, 16, True, True),
        (12, 2, 128, 64, False, False),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_queries_and_rows(
    heads: int, kv_heads: int, dim: int, rotary: int, interleaved: bool, norm: bool, tokens: int, device: torch.device,
    rng: torch.Generator,
) -> None:  # fmt: skip
    ops = PlainOps()
    cos, sin = rope_tables(40, rotary, interleaved, rng)
    positions = torch.randint(0, 40, (tokens,), generator=rng)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=rng)
    q_weight, k_weight = (torch.rand(dim, generator=rng) + 0.5 for _ in range(2))
    kv_rows = torch.randperm(20, generator=rng)[:tokens]
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    if norm:
        q, k = ops.rms_norm(q, q_weight, 1e-5), ops.rms_norm(k, k_weight, 1e-5)
    q, k = (ops.rotary(x, cos[positions], sin[positions], interleaved=interleaved) for x in (q, k))
    expected = torch.zeros(2, 20, kv_heads, dim)
    expected[0].index_copy_(0, kv_rows, k)
    expected[1].index_copy_(0, kv_rows, v)

    pool = torch.zeros(2, 20, kv_heads, dim, device=device)
    weights = {"q_weight": q_weight.to(device), "k_weight": k_weight.to(device), "eps": 1e-5} if norm else {}
    for tables in (
        {"cos": cos, "sin": sin, "positions": positions.to(device)},
        {"cos": cos[positions], "sin": sin[positions]},
    ):
        out = rotate_and_append(
            qkv.flatten(1).to(device), kv_rows=kv_rows.to(device), k_rows=pool[0], v_rows=pool[1], heads=heads,
            interleaved=interleaved, **weights, **{name: t.to(device) for name, t in tables.items()},
        )  # fmt: skip
        torch.testing.assert_close(out.cpu(), q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_an_fp8_pool_is_divided_by_its_scales(device: torch.device, rng: torch.Generator) -> None:
    # Values that FP8 holds exactly, since the interpreter rounds to FP8 in a way of its own; rotary turns by nothing.
    q, k, v = torch.randn(3, 4, 32, generator=rng).to(torch.float8_e4m3fn).float().split([2, 1, 1], 1)
    qkv = torch.cat((q, k * 0.5, v * 4.0), 1).flatten(1).to(device)
    cos, sin = torch.ones(3, 1, 32, device=device), torch.zeros(3, 1, 32, device=device)
    pool = torch.zeros(2, 8, 1, 32, device=device, dtype=torch.float8_e4m3fn)
    rows = torch.tensor([5, 1, 0], device=device)
    rotate_and_append(qkv, cos, sin, rows, pool[0], pool[1], 2, k_scale=0.5, v_scale=4.0)
    assert torch.equal(pool[0].float()[rows].cpu(), k)
    assert torch.equal(pool[1].float()[rows].cpu(), v)


def test_append_writes_both_parts_of_a_cache(device: torch.device, rng: torch.Generator) -> None:
    cache = torch.zeros(10, 48, device=device)
    whole = torch.randn(4, 60, generator=rng).to(device)
    rows = torch.tensor([3, 9, 0, 4], device=device)
    append(whole[:, :32], whole[:, 40:56], rows, cache[:, :32], cache[:, 32:])
    expected = torch.zeros_like(cache)
    expected[rows] = torch.cat((whole[:, :32], whole[:, 40:56]), 1)
    assert torch.equal(cache, expected)


def test_heads_side_by_side_are_not_copied() -> None:
    x = torch.randn(3, 8, 4)
    assert flat_heads(x[:, 2:5]).data_ptr() == x[:, 2:5].data_ptr()
    assert torch.equal(flat_heads(x[:, 2:5]), x[:, 2:5].flatten(1))
    assert torch.equal(flat_heads(x[:, ::2]), x[:, ::2].flatten(1))
