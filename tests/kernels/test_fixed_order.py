"""Deterministic mode, operation by operation: a row has the bits that it has alone, in batches of 1 to 64, at any place in
them, in queries of 1 to 8 rows and across any chunk borders, with one thread and with two."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fluentllm.kernels.attention_fixed import fixed_order_attention
from fluentllm.kernels.fixed_order import FixedOrderOps
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.weights import PRECISIONS

ROWS = 64
WIDTH, OUT, HEADS, DIM = 96, 80, 3, 32
OPS = FixedOrderOps()
Operation = Callable[..., Tensor]


@pytest.fixture(autouse=True, scope="module", params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_rows(operation: Operation, *operands: Tensor) -> None:
    """`operands` [64, ...]; the operation is applied to the same rows of each."""
    alone = torch.cat([operation(*(x[i : i + 1].clone() for x in operands)) for i in range(ROWS)])
    generator = torch.Generator().manual_seed(1)
    for batch in range(ROWS + 1):
        chosen = torch.randperm(ROWS, generator=generator)[:batch]
        assert torch.equal(operation(*(x[chosen] for x in operands)), alone[chosen]), f"batch of {batch}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(precision: str, dtype: torch.dtype) -> None:
    weight, bias = OPS.pack(random(OUT, WIDTH, seed=2), precision), random(OUT, seed=3).to(dtype)
    check_rows(lambda x: OPS.linear(x, weight, bias), random(ROWS, WIDTH).to(dtype))


def test_linear_as_wide_as_a_vocabulary() -> None:
    """Long sums and many outputs: where libraries begin to split work."""
    weight = OPS.pack(random(5000, 1537, seed=2), "float32")
    x = random(ROWS, 1537)
    alone = torch.cat([OPS.linear(row.unsqueeze(0), weight) for row in x[:12]])
    for batch in (1, 2, 7, 8, 9, 12, 64):
        assert torch.equal(OPS.linear(x[:batch], weight)[:12], alone[:batch])


def test_bmm() -> None:
    weights = random(HEADS, DIM, 24, seed=2)
    check_rows(lambda x: OPS.bmm(x.transpose(0, 1), weights).transpose(0, 1), random(ROWS, HEADS, DIM))


@pytest.mark.parametrize("width", [1, 7, 96, 576, 5000])
def test_rms_norm(width: int) -> None:
    weight = random(width, seed=2)
    check_rows(lambda x: OPS.rms_norm(x, weight, 1e-5), random(ROWS, width))


def test_rms_norm_of_heads() -> None:
    weight = random(DIM, seed=2)
    check_rows(lambda x: OPS.rms_norm(x, weight, 1e-5), random(ROWS, HEADS, DIM))


def test_add_rms_norm_and_add() -> None:
    weight = random(WIDTH, seed=2)
    check_rows(lambda a, b: OPS.add_rms_norm(a, b.clone(), weight, 1e-5), random(ROWS, WIDTH), random(ROWS, WIDTH, seed=3))
    check_rows(OPS.add, random(ROWS, WIDTH), random(ROWS, WIDTH, seed=3))


@pytest.mark.parametrize("inner", [1, 5, 48, 1536])
def test_silu_mul(inner: int) -> None:
    check_rows(OPS.silu_mul, random(ROWS, 2 * inner))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [DIM, DIM // 2])
def test_rotary(interleaved: bool, rotated: int) -> None:
    angles = random(ROWS, 1, rotated, seed=2)

    def rotate(x: Tensor, angle: Tensor) -> Tensor:
        return OPS.rotary(x, angle.cos(), angle.sin(), interleaved=interleaved)

    check_rows(rotate, random(ROWS, HEADS, DIM), angles)


def test_embedding() -> None:
    table = random(100, WIDTH, seed=2)
    check_rows(lambda tokens: OPS.embedding(tokens, table), torch.arange(ROWS))


def test_the_values_are_those_of_the_fast_operations() -> None:
    plain, x, y = PlainOps(), random(ROWS, WIDTH), random(ROWS, WIDTH, seed=1)
    weight, norm = random(OUT, WIDTH, seed=2), random(WIDTH, seed=3)
    angle = random(ROWS, 1, WIDTH, seed=4)
    for exact, fast in (
        (OPS.linear(x, OPS.pack(weight, "float32")), plain.linear(x, plain.pack(weight, "float32"))),
        (OPS.rms_norm(x, norm, 1e-5), plain.rms_norm(x, norm, 1e-5)),
        (OPS.add_rms_norm(x, y.clone(), norm, 1e-5), plain.add_rms_norm(x, y.clone(), norm, 1e-5)),
        (OPS.silu_mul(x), plain.silu_mul(x)),
        (OPS.rotary(x.unsqueeze(1), angle.cos(), angle.sin()), plain.rotary(x.unsqueeze(1), angle.cos(), angle.sin())),
    ):
        torch.testing.assert_close(exact, fast, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- attention
LENGTH = 150
"""Tokens of a sequence: more than two tiles of keys."""


class Sequence:
    """Queries, keys and values of one sequence: of heads in groups, or of one latent for all heads (MLA, absorbed)."""

    def __init__(self, kind: str) -> None:
        kv_heads, values = (2, 16) if kind == "gqa" else (1, 24)
        self.q = random(LENGTH, 4, DIM, seed=2)
        self.k = random(LENGTH, kv_heads, DIM, seed=3)
        self.v = random(LENGTH, kv_heads, values, seed=4) if kind == "gqa" else self.k[..., :values]

    def rows(self, start: int, count: int) -> Tensor:
        """Attention of these rows in a pass of their own, in which the keys end with them."""
        stop = start + count
        positions = torch.arange(start, stop)
        return fixed_order_attention(self.q[start:stop], self.k[:stop], self.v[:stop], positions, DIM**-0.5)


@pytest.fixture(scope="module", params=["gqa", "mla"])
def sequence(request: pytest.FixtureRequest) -> tuple[Sequence, Tensor]:
    """And what each of its rows is alone."""
    made = Sequence(request.param)
    return made, torch.cat([made.rows(i, 1) for i in range(LENGTH)])


@pytest.mark.parametrize("query", range(1, 9))
def test_attention_of_queries_of_several_rows(sequence: tuple[Sequence, Tensor], query: int) -> None:
    made, alone = sequence
    for start in (0, 1, 60, 63, 64, 65, 127, LENGTH - query):
        assert torch.equal(made.rows(start, query), alone[start : start + query])


@pytest.mark.parametrize("chunk", [1, 5, 16, 63, 64, 65, 100, LENGTH])
def test_attention_across_chunk_borders(sequence: tuple[Sequence, Tensor], chunk: int) -> None:
    made, alone = sequence
    parts = [made.rows(start, min(chunk, LENGTH - start)) for start in range(0, LENGTH, chunk)]
    assert torch.equal(torch.cat(parts), alone)


def test_attention_is_that_of_the_softmax(sequence: tuple[Sequence, Tensor]) -> None:
    made, alone = sequence
    keys, values = (x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (made.k, made.v))
    scores = made.q.transpose(0, 1) @ keys.transpose(1, 2) * DIM**-0.5
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(mask, float("-inf")).softmax(-1) @ values
    torch.testing.assert_close(alone, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)
