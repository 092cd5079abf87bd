"""benchmarks/kernels/: what its programs are told and compare with, as far as it needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.mla_decode import fp8_planes, new_fp8_pool
from fluentllm.kernels.mla_decode.reference import append_reference, decode_reference, fetch_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    Program = Callable[[str], ModuleType]

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"
SCALE = (128 + 64) ** -0.5


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Imports a module of the folder as the programs do. Other folders have some of the same name, so it does not stay."""
    monkeypatch.syspath_prepend(str(KERNELS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(KERNELS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# --------------------------------------------------------------------------------------------------------------------- shapes
@dataclass(frozen=True)
class Matrix:
    rows: int
    depth: int
    ratio: float = 2.0
    zero: int = 0
    gated: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.depth % 16:
            raise ValueError(f"depth must be a multiple of 16, not {self.depth}")


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("rows=2048,depth=6144", Matrix(2048, 6144)),
        ("depth=32,gated,rows=1", Matrix(1, 32, gated=True)),
        ("rows=1,depth=16,zero=0,ratio=0.5,name=qkv", Matrix(1, 16, 0.5, name="qkv")),
    ],
)
def test_a_shape(program: Program, text: str, shape: Matrix) -> None:
    assert program("shapes").shape_of(text, Matrix) == shape


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2048x6144", "'2048x6144', which is none of rows, depth, ratio, zero, gated, name; write rows=N,depth=N[,ratio=N]"),
        ("rows=2048", "lacks depth"),
        ("rows=1,rows=2,depth=16", "rows twice"),
        ("rows,depth=16", "needs rows with a value"),
        ("rows=1,depth=16,gated=1", "needs gated alone, without a value"),
        ("rows=0,depth=16", "rows to be a whole number of at least 1, not '0'"),
        ("rows=1.5,depth=16", "rows to be a whole number of at least 1, not '1.5'"),
        ("rows=1,depth=16,zero=-1", "zero to be a whole number of at least 0, not '-1'"),
        ("rows=1,depth=16,ratio=nan", "ratio to be a number above 0, not 'nan'"),
        ("rows=1,depth=17", "depth must be a multiple of 16, not 17"),
        ("", "'', which is none of rows"),
    ],
)
def test_a_shape_that_is_none(program: Program, text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        program("shapes").shape_of(text, Matrix)
    assert said in str(error.value)


def test_several_shapes(program: Program) -> None:
    shapes, parser = program("shapes"), argparse.ArgumentParser()
    shapes.add_shape(parser, Matrix, "matrices")
    given = parser.parse_args(["--shape", "rows=1,depth=16", "rows=2,depth=16", "--shape", "rows=3,depth=16"])
    assert [one.rows for one in given.shape] == [1, 2, 3]
    assert parser.parse_args([]).shape == []
    assert "rows=N,depth=N[,ratio=N][,zero=N][,gated][,name=TEXT]" in " ".join(parser.format_help().split())


def test_named_sets_are_for_who_gives_no_shapes(program: Program) -> None:
    named = program("shapes").named
    assert named(None, [], "ab") == ["a", "b"]
    assert named(None, ["shape"], "ab") == []
    assert named(["b"], ["shape"], "ab") == ["b"]


def test_lists(program: Program) -> None:
    shapes = program("shapes")
    assert shapes.numbers("1,8") == [1, 8]
    assert shapes.numbers_from_0("0,8") == [0, 8]
    assert shapes.names(["a", "b"])("b,a") == ["b", "a"]
    for parse, text, said in (
        (shapes.numbers, "0,8", "'0,8' is no list of whole numbers of at least 1"),
        (shapes.numbers, "1,", "'1,' is no list"),
        (shapes.names(["a", "b"]), "a,c", "there is no 'c': a,b"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert said in str(error.value)


def test_a_product_of_any_shape(program: Program) -> None:
    gemm, shapes = program("gemm"), program("shapes")
    given = [shapes.shape_of(text, gemm.Matrix) for text in ("rows=2048,depth=6144", "rows=256,depth=64,gated,name=mine")]
    options = argparse.Namespace(models=None, shape=given, kinds=["fp8"])
    assert gemm.chosen_shapes(options) == [
        gemm.Shape("2048x6144", "fp8", 2048, 6144, False),
        gemm.Shape("mine", "fp8", 256, 64, True),
    ]
    options = argparse.Namespace(models=None, shape=[], kinds=["bf16"])
    assert {one.name for one in gemm.chosen_shapes(options)} >= {"qwen.qkv", "llam.head", "deep.q_b"}


# ---------------------------------------------------------------------------------------------------------------------- rates
def test_shares_are_of_the_larger_floor(program: Program) -> None:
    rates = program("rates").Rates(copy=4000.0, bf16=500.0, fp8=1000.0)
    assert rates.floor_us(4e6) == 1.0
    assert rates.floor_us(4e6, bf16=1e9) == 2.0
    assert rates.floor_us(4e6, bf16=1e9, fp8=3e9) == 5.0
    assert rates.share(10.0, 4e6, fp8=3e9) == 0.3


def test_what_cannot_be_measured_is_an_h100s_and_said_so(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rates = program("rates")

    def fails() -> float:
        raise RuntimeError("no such products here")

    for name, rate in (("copy_rate", lambda: 4321.0), ("bf16_rate", lambda: 777.0), ("fp8_rate", fails)):
        monkeypatch.setattr(rates, name, rate)
    found = rates.here()
    assert (found.copy, found.bf16, found.fp8, found.assumed) == (4321.0, 777.0, rates.H100.fp8, ("fp8",))
    assert rates.here() is found
    printed = capsys.readouterr().out
    assert "no such products here" in printed
    assert "copy 4,321 GB/s, BF16 777 TFLOP/s, FP8 1,600 TFLOP/s; NOT measured but an H100's: fp8" in printed
    rates.write_rows(tmp_path / "rows.json", [{"us": 1.0}], found)
    written = {"copy_GBps": 4321.0, "bf16_TFLOPs": 777.0, "fp8_TFLOPs": 1600.0, "assumed": ["fp8"]}
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"us": 1.0, "rates": written}]


def test_a_line_shows_what_was_not_measured(program: Program) -> None:
    assert program("sweep").line(("a", 1, 2.345, None), (3, 3, 5, 3)) == "  a    1    2.3    -"


def test_an_embeddings_floor(program: Program) -> None:
    embedding, rates = program("ngram").Embedding(), program("rates").Rates(copy=1000.0, bf16=1e6, fp8=1e6)
    row = 2 * 3072
    assert math.isclose(embedding.floor_us(8, rates, None), (row * 3072 + 3 * 8 * row) / 1e6)
    assert math.isclose(embedding.floor_us(8, rates, 0.001), 8 * row)  # the bus sets the pace
    with pytest.raises(ValueError, match="of the 12 tables, not 160"):
        program("ngram").Embedding(hidden=160)


# ----------------------------------------------------------------------------------------------------------------- mla_decode
def mla_case(q_len: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a BF16 pool in which pages are scattered, their table, lengths."""
    counts = [-(-length // 64) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for i, count in enumerate(counts):
        table[i, :count] = torch.tensor(order[:count])
        del order[:count]
    pool = torch.randn(sum(counts) + 1, 64, 576).bfloat16()
    queries = (torch.randn(len(lengths), q_len, 3, width).bfloat16() * 0.3 for width in (512, 64))
    return (*queries, pool, table, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize(("q_len", "lengths"), [(1, [130, 130]), (1, [1, 64, 200]), (3, [100, 3, 64])])
def test_mla_in_plain_torch(program: Program, q_len: int, lengths: list[int]) -> None:
    others = program("mla_others")
    q_latent, q_rope, pool, table, known = mla_case(q_len, lengths)
    keys = others.dense_keys(pool, table, max(lengths))
    found = others.torch_decode(q_latent, q_rope, keys, known, SCALE)()
    expected = decode_reference(q_latent, q_rope, pool, table, known, SCALE)
    assert found.shape == expected.shape
    assert (found.float() - expected).norm() < 0.01 * expected.norm()
    assert (others.hidden_keys(known, q_len, 3, max(lengths)) is None) == (q_len == 1 and len(set(lengths)) == 1)


def test_an_fp8_cache_in_bf16(program: Program) -> None:
    planes, rows = fp8_planes(new_fp8_pool(3, "cpu")), torch.arange(3 * 64)
    append_reference(planes, torch.randn(192, 512) * 3, torch.randn(192, 64) * 30, rows)
    found = program("mla_others").bf16_tokens(planes)
    assert torch.equal(found.flatten(0, 1).float(), torch.cat(fetch_reference(planes, rows), -1))


class Wrapper:
    """Takes what FlashInfer 0.6.12's BatchMLAPagedAttentionWrapper takes, and computes from that alone."""

    def __init__(self, workspace: torch.Tensor, *, backend: str) -> None:
        assert (workspace.ndim, backend) == (1, "fa3")

    def plan(
        self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_len_arr: torch.Tensor,
        num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float,
        q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert {one.dtype for one in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        assert (num_heads, head_dim_ckv, head_dim_kpe, page_size, q_data_type, kv_data_type) == (
            3, 512, 64, 64, torch.bfloat16, torch.bfloat16)  # fmt: skip
        ends = kv_indptr.tolist()
        pages = [kv_indices[a:b] for a, b in pairwise(ends)]
        self.table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
        self.rows = int(qo_indptr[1])
        assert qo_indptr.tolist() == [self.rows * i for i in range(len(pages) + 1)]
        assert causal == (self.rows > 1)
        self.lengths, self.scale = kv_len_arr, sm_scale

    def run(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, ckv: torch.Tensor, kpe: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        queries = (q.unflatten(0, (-1, self.rows)) for q in (q_nope, q_pe))
        found = decode_reference(*queries, torch.cat((ckv, kpe), -1), self.table, self.lengths, self.scale)
        return out.copy_(found.flatten(0, 1))


@pytest.mark.parametrize(("q_len", "lengths"), [(1, [1, 64, 200]), (3, [100, 3, 64])])
def test_mla_by_flashinfer_is_planned_right(program: Program, q_len: int, lengths: list[int]) -> None:
    case = mla_case(q_len, lengths)
    found = program("mla_others").flashinfer_decode(Wrapper, *case, SCALE)()
    q_latent, q_rope, pool, table, known = case
    assert torch.equal(found, decode_reference(q_latent, q_rope, pool, table, known, SCALE).bfloat16())


def test_mla_without_flashinfer(program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    others = program("mla_others")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert others.flashinfer_wrapper() is None
    assert "FlashInfer is not installed (pip install 'fluentllm[cuda]')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kv", "heads", "own"),
    [
        ("fp8", 16, {"swap"}),
        ("fp8", 17, {"registers"}),
        ("fp8", 32, {"registers"}),
        ("fp8", 64, {"registers"}),
        ("bf16", 32, {"swap"}),
        ("bf16", 33, set()),
    ],
)
def test_mla_variants_are_of_what_ships(program: Program, kv: str, heads: int, own: set[str]) -> None:
    variants = program("mla_variants").variants(program("mla_decode").Shape(heads, 1, 32, 4096, kv))
    assert {"swap", "registers"} & set(variants) == own


# --------------------------------------------------------------------------------------------------------------- grouped_gemm
def test_torch_takes_the_experts_in_fp8(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = program("grouped_gemm")
    layer = program("shapes").shape_of("experts=4,top_k=2,hidden=256,inner=128,zero=1", grouped.Layer)
    assert layer.label == "2/4+1x256x128"
    x = torch.randn(3, 128)
    q, scale = grouped.quantise_rowwise(x)
    assert torch.equal(q.float().abs().amax(1), torch.full((3,), 448.0))
    assert torch.allclose(q.float() * scale[:, None], x, rtol=0.07, atol=1e-3)
    # torch's own checks of types, shapes and strides, on tensors without memory.
    case = grouped.Case(layer, "fp8", "meta")
    monkeypatch.setattr(grouped, "silu_mul", lambda h: h[:, : h.shape[1] // 2].contiguous())
    run = case._torch_fp8(
        torch.empty(7, 256, dtype=torch.bfloat16, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    )
    assert run().shape == (7, 256)
    assert [scale.shape for _, scale in case.rowwise] == [(4, 256), (4, 256)]


def test_torchs_rows_are_in_the_order_it_says(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = program("grouped_gemm")
    monkeypatch.setattr(grouped, "silu_mul", lambda h: torch.nn.functional.silu(h[:, :32]) * h[:, 32:])
    case = grouped.Case(grouped.Layer(4, 2, 64, 32, zero=2), "bf16", "cpu")
    case.draw(9)
    pairs, expected = case.expected()
    runs, order = case.torchs()
    found = runs[0]()
    assert sorted(order.tolist()) == pairs.tolist()
    assert (found.float() - expected[order]).norm() < grouped.TORCH_LIMITS["bf16"] * expected.norm()


# ------------------------------------------------------------------------------------------------------------------ attention
def test_attention_counts_what_a_call_moves(program: Program) -> None:
    attention = program("attention")
    model = attention.Heads(32, 8, 128).model
    decode = attention.Point(4, 1, 1000, "decode")
    assert attention.counted(model, decode) == (2 * (4 * 1000 * 8 + 4 * 32) * 256, 2 * 4 * 1000 * 32 * 256)
    prefill = attention.Point(1, 3, 5, "prefill")  # rows that see 3, 4 and 5 keys
    assert attention.counted(model, prefill) == (2 * (5 * 8 + 3 * 32) * 256, 2 * 12 * 32 * 256)
    kv = KVSpec(kind="mla", layers=1, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128)
    mla = ModelSpec(architecture="", vocab_size=1, hidden_size=1, layers=1, heads=16, max_position=1, kv=kv)
    up = 16 * 512 * 256
    assert attention.counted(mla, decode) == (
        2 * (4000 * 576 + 4 * 16 * 320 + up), 2 * (4000 * 16 * (1024 + 64) + 4 * up))  # fmt: skip
    assert attention.counted(mla, prefill) == (2 * (5 * 576 + 3 * 16 * 320 + up), 2 * (12 * 16 * 320 + 5 * up))


def test_attention_of_any_batch(program: Program) -> None:
    attention = program("attention")
    given: dict[str, Any] = {"batch": [2], "ctx": [64, 128], "q_len": [1, 4], "new": None, "cached": None}
    points = attention.wanted_points(argparse.Namespace(**given), "decode", 1 << 20)
    assert [(one.sequences, one.rows, one.keys) for one in points] == [(2, 1, 64), (2, 1, 128), (2, 4, 64), (2, 4, 128)]
    assert len(attention.wanted_points(argparse.Namespace(**given), "prefill", 1 << 20)) == 3  # those of `auto`
    # `compare` names points without their rows, so that those of other rows must be asked for apart.
    times = attention.timed(points, lambda alike: {str(one): {"triton": 10.0 * one.rows + one.keys} for one in alike})
    assert [times[one]["triton"] for one in points] == [74.0, 138.0, 104.0, 168.0]
