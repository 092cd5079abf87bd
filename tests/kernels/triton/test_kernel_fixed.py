"""Deterministic mode on a GPU, operation by operation and through a backend: a row has the bits that it has alone, in batches
of 1 to 64, at any place in them, in queries of 1 to 8 rows and across any chunk borders; and the values are the reference's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fluentllm.core.batch import Batch
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.moe import Routing
from fluentllm.kernels.ngram import NgramHash, NgramTables
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton import fixed_attention
from fluentllm.kernels.triton.fixed_ops import FixedTritonOps
from fluentllm.plugins.attn_torch.fixed import FixedOrderAttention
from fluentllm.plugins.attn_triton.fixed import FixedTritonAttention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("ordered_dots")
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
ROWS = 10 if INTERPRETED else 64
BATCHES = (0, ROWS) if INTERPRETED else range(ROWS + 1)
ALONE = 1 if INTERPRETED else 6
"""Rows of an operation that are also computed one by one."""
WIDTH, OUT = 96, 80
OPS = FixedTritonOps()
Operation = Callable[..., Tensor]
Backend = Callable[[AttentionContext], AttentionBackend]


class Maker:
    def __init__(self, device: torch.device, rng: torch.Generator) -> None:
        self.device, self.rng = device, rng

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.rng).to(self.device, dtype)


@pytest.fixture
def make(device: torch.device, rng: torch.Generator) -> Maker:
    return Maker(device, rng)


def check_rows(operation: Operation, *operands: Tensor, alone: int = ALONE) -> None:
    """`operands` [ROWS, ...]; the operation is applied to the same rows of each, and to the first `alone` of them alone."""
    each = torch.cat([operation(*(x[i : i + 1].clone() for x in operands)) for i in range(alone)])
    for batch in BATCHES:
        chosen = torch.randperm(ROWS)[:batch].to(operands[0].device)
        out = operation(*(x[chosen] for x in operands))
        assert out.shape[0] == batch
        known = chosen < alone
        assert torch.equal(out[known], each[chosen[known]]), f"batch of {batch}"


# --------------------------------------------------------------------------------------------------------------- operations
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, make: Maker) -> None:
    weight, bias = (make(*shape, dtype=dtype) * WIDTH**-0.5 for shape in ((OUT, WIDTH), (OUT,)))
    x = make(ROWS, WIDTH, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    packed = OPS.pack(weight, name)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    plain = PlainOps()
    for ours, theirs in (
        (lambda x: OPS.linear(x, packed, bias), lambda x: plain.linear(x, plain.pack(weight, name), bias)),
        (lambda x: OPS.gated_linear(x, packed), lambda x: plain.gated_linear(x, plain.pack(weight, name))),
        (lambda x: OPS.logits(x, packed), lambda x: x.float() @ weight.float().T),
    ):
        check_rows(ours, x)
        torch.testing.assert_close(ours(x), theirs(x), **tolerance)


@pytest.mark.skipif(INTERPRETED, reason="long products are for the GPU")
@pytest.mark.parametrize(("rows", "depth"), [(151936, 1024), (2112, 2048), (4096, 14336)])
def test_linear_of_real_shapes(rows: int, depth: int, make: Maker) -> None:
    packed = OPS.pack(make(rows, depth, dtype=torch.bfloat16) * depth**-0.5, "bfloat16")
    check_rows(lambda x: OPS.linear(x, packed), make(ROWS, depth, dtype=torch.bfloat16), alone=8)


def test_block_fp8(make: Maker) -> None:
    packed = OPS.pack(make(256, 256), "fp8")
    x = make(ROWS, 256, dtype=torch.bfloat16)
    check_rows(lambda x: OPS.gated_linear(x, packed), x)
    if not INTERPRETED:
        check_rows(lambda x: OPS.linear(x, packed), x)


def test_bmm(make: Maker) -> None:
    weights = make(3, 40, 70)
    check_rows(lambda x: OPS.bmm(x.transpose(0, 1), weights).transpose(0, 1), make(ROWS, 3, 40))
    x = make(3, 5, 40)
    torch.testing.assert_close(OPS.bmm(x, weights), torch.bmm(x, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_what_is_elementwise(dtype: torch.dtype, make: Maker) -> None:
    weight, x, y = make(WIDTH, dtype=dtype), make(ROWS, WIDTH, dtype=dtype), make(ROWS, WIDTH, dtype=dtype)
    angle = make(ROWS, 1, 32)
    check_rows(lambda x: OPS.rms_norm(x, weight, 1e-5), x)
    check_rows(lambda a, b: OPS.add_rms_norm(a, b.clone(), weight, 1e-5), x, y)
    check_rows(OPS.silu_mul, x)
    check_rows(lambda x, a: OPS.rotary(x, a.cos().to(dtype), a.sin().to(dtype)), x.view(ROWS, 3, 32), angle)


ROUTINGS = [
    (Routing(experts=6, top_k=2, zero_experts=4, scores="sigmoid", renormalise=True), torch.bfloat16),
    (Routing(experts=8, top_k=3), torch.float32),
]


@pytest.mark.parametrize(("routing", "dtype"), ROUTINGS[:1] if INTERPRETED else ROUTINGS)
def test_experts(routing: Routing, dtype: torch.dtype, make: Maker) -> None:
    """Router and experts; torch's own, with the same choices, is the reference."""
    hidden, inner = 64, 48
    gate_up, down = make(routing.experts, 2 * inner, hidden, dtype=dtype), make(routing.experts, hidden, inner, dtype=dtype)
    matrices = _Experts(gate_up / 8, down / 8)
    router = OPS.pack(make(routing.total, hidden), "float32")

    def block(x: Tensor) -> Tensor:
        weights, ids = OPS.route(OPS.router_logits(x, router), routing, None)
        return OPS.experts(x, weights, ids, matrices, routing, x)

    x = make(ROWS, hidden, dtype=dtype)
    check_rows(block, x)
    weights, ids = OPS.route(OPS.router_logits(x, router), routing, None)
    expected = PlainOps().experts(x, weights, ids.long(), matrices, routing, x)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(block(x), expected, **tolerance)


class _Experts:
    """`kernels.ops.ExpertWeights`."""

    gate_up_scale = down_scale = None

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, number: int, rows: Tensor) -> Tensor:
        return PlainOps().silu_mul(rows @ self.gate_up[number].T) @ self.down[number].T


def test_ngram_embedding(make: Maker) -> None:
    hash_ = NgramHash(50, 4, 3, 2, [1])
    sizes = [hash_.rows(i) for i in range(hash_.tables)]
    hidden = 16 * hash_.tables
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=make.device)
    moved = (x.to(make.device) for x in (hash_.factors(), hash_.moduli(), torch.tensor([1])))
    tables = NgramTables(make(sum(sizes), 16), starts, *moved)
    history = torch.randint(0, 50, (2, 80), dtype=torch.int32, generator=make.rng).to(make.device)
    words, projection = make(50, hidden), OPS.pack(make(hidden, hidden), "float32")
    positions = torch.arange(ROWS, device=make.device)

    def embed(positions: Tensor) -> Tensor:
        slots = positions % 2
        return OPS.ngram_embedding(history[slots, positions].long(), positions, slots, history, tables, words, projection)

    check_rows(embed, positions)
    slots = positions % 2
    plain = PlainOps()
    given = history[slots, positions].long(), positions, slots, history, tables, words
    torch.testing.assert_close(embed(positions), plain.ngram_embedding(*given, projection), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- attention
LENGTH, PAGE, SPAN = 72 if INTERPRETED else 150, 16, 64
"""Tokens of a sequence: two or three runs of `SPAN` keys."""
HEADS = 4 if INTERPRETED else 6
KINDS = {
    "gqa": KVSpec(kind="gqa", layers=1, heads=2, head_dim=32, v_head_dim=32),
    "gqa of 96": KVSpec(kind="gqa", layers=1, heads=2, head_dim=96, v_head_dim=96),
    "mla": KVSpec(kind="mla", layers=1, latent_dim=32, rope_dim=16),
}


@pytest.fixture(scope="module", autouse=True)
def short_runs() -> Iterator[None]:
    """So that short sequences have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_attention, "LEAST_SPAN", SPAN)
        yield


class Passes:
    """Two sequences whose queries, keys and values are given for every position; any cut into passes over one backend."""

    def __init__(
        self, kind: str, dtype: torch.dtype, device: torch.device, backend: Callable[[AttentionContext], AttentionBackend]
    ) -> None:
        self.kv, self.device = KINDS[kind], device
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        model = ModelSpec(
            architecture="x", vocab_size=9, hidden_size=64, layers=1, heads=HEADS, max_position=LENGTH, kv=self.kv
        )
        name = str(dtype).removeprefix("torch.")
        spec = AttentionSpec(model=model, device="cuda", dtype=name, kv_dtype=name, page_size=PAGE, deterministic=True)
        self.pages = -(-LENGTH // PAGE)
        self.pool = KVPool(self.kv, 2 * self.pages, PAGE, dtype, device)
        self.table = (torch.randperm(2 * self.pages, generator=generator) + 1).view(2, -1).to(device, torch.int32)
        self.backend = backend(AttentionContext(spec, self.pool, Settings()))
        if self.kv.kind == "gqa":
            shapes = [(HEADS, self.kv.head_dim), (self.kv.heads, self.kv.head_dim), (self.kv.heads, self.kv.v_head_dim)]
            self.weights: list[Tensor] = []
        else:
            shapes = [(HEADS, 24), (HEADS, self.kv.rope_dim), (self.kv.latent_dim,), (self.kv.rope_dim,)]
            self.weights = [draw(HEADS, n, self.kv.latent_dim) / 6 for n in (24, 20)]
        self.inputs = [draw(2, LENGTH, *shape) for shape in shapes]

    def run(self, chunks: list[tuple[int, int, int]], decode: bool) -> list[Tensor]:
        """(sequence, first position, rows) each → its rows of attention."""
        counts, lengths = [c for _, _, c in chunks], [start + c for _, start, c in chunks]
        order = torch.tensor([s for s, _, _ in chunks], device=self.device)
        positions = torch.cat([torch.arange(start, start + c) for _, start, c in chunks]).to(self.device)
        sequences = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts)).to(self.device)
        table = self.table[order]
        pages = table[sequences, positions // PAGE].long()
        batch = Batch(
            tokens=positions, positions=positions, sequences=sequences, slots=order,
            query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=self.device),
            kv_lengths=torch.tensor(lengths, dtype=torch.int32, device=self.device), page_table=table,
            kv_rows=pages * PAGE + positions % PAGE, history=table, page_size=PAGE,
            query_length=counts[0] if decode else None, query_lengths=None if decode else tuple(counts),
            kv_lengths_host=None if decode else tuple(lengths),
        )  # fmt: skip
        given = [x[order[sequences], positions] for x in self.inputs]
        self.backend.begin(batch)
        call = self.backend.gqa if self.kv.kind == "gqa" else self.backend.mla
        return list(call(0, *given, *self.weights, batch, 0.2).split(counts))

    def fill(self, length: int = LENGTH) -> list[Tensor]:
        """Both sequences, whole, alone → their rows."""
        return [self.run([(s, 0, length)], False)[0] for s in (0, 1)]


SETTINGS = [("gqa", torch.float32), ("mla", torch.bfloat16), ("gqa of 96", torch.bfloat16), ("mla", torch.float32)]


@pytest.fixture(scope="module", params=SETTINGS[:2] if INTERPRETED else SETTINGS, ids=str)
def attention(request: pytest.FixtureRequest, short_runs: None, ordered_dots: None) -> tuple[Passes, list[Tensor]]:
    """Shared by the tests: whatever cut they try writes the same keys to the same pages."""
    passes = Passes(*request.param, torch.device("cpu" if INTERPRETED else "cuda"), FixedTritonAttention)
    return passes, passes.fill()


def test_attention_is_the_references(attention: tuple[Passes, list[Tensor]]) -> None:
    passes, alone = attention
    dtype = passes.inputs[0].dtype
    kind = next(kind for kind, kv in KINDS.items() if kv is passes.kv)
    expected = Passes(kind, dtype, passes.device, FixedOrderAttention).fill()
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in zip(alone, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_attention_of_queries_of_several_rows(attention: tuple[Passes, list[Tensor]]) -> None:
    """Verification of 0 to 7 drafts, of both sequences together, at ends of blocks and runs: split among programs."""
    passes, alone = attention
    for query in (1, 8) if INTERPRETED else range(1, 9):
        for start in (62,) if INTERPRETED else (0, 1, 60, 63, 64, 65, 127, LENGTH - query):
            for sequence, rows in enumerate(passes.run([(0, start, query), (1, start, query)], True)):
                assert torch.equal(rows, alone[sequence][start : start + query]), (query, start)


def test_attention_of_many_sequences(attention: tuple[Passes, list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that no sequence is split among programs, and a few, which are."""
    passes, alone = attention
    if INTERPRETED:
        monkeypatch.setattr(fixed_attention, "multiprocessors", lambda device: 4)
    for batch in (5,) if INTERPRETED else (1, 3, 64, 256):
        chunks = [(i % 2, (37 * i + 5) % (LENGTH - 2), 2) for i in range(batch)]
        for (sequence, start, _), rows in zip(chunks, passes.run(chunks, True), strict=True):
            assert torch.equal(rows, alone[sequence][start : start + 2]), (batch, start)


@pytest.mark.parametrize("chunk", [33] if INTERPRETED else [5, 33, 64, 100])
def test_attention_across_chunk_borders(attention: tuple[Passes, list[Tensor]], chunk: int) -> None:
    """Both sequences side by side, the second one chunk behind, whose rows are few or many."""
    passes, alone = attention
    starts = range(0, LENGTH, chunk)
    parts = [passes.run([(0, s, min(chunk, LENGTH - s)), (1, s, min(chunk, LENGTH - s, 7))], False) for s in starts]
    assert torch.equal(torch.cat([part[0] for part in parts]), alone[0])
    for start, (_, rows) in zip(starts, parts, strict=True):
        assert torch.equal(rows, alone[1][start : start + rows.shape[0]])


def test_nothing_to_attend_to(attention: tuple[Passes, list[Tensor]]) -> None:
    assert attention[0].run([(0, 0, 0), (1, 3, 2)], False)[0].shape[0] == 0
