"""The C kernels against the plain operations beside them: ragged, empty, strided, any width of heads and page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_kernels import native_library

from fluentllm.kernels import choose_ops, load_library, weights
from fluentllm.kernels.attention_reference import gather_rows, gqa_reference
from fluentllm.kernels.copies import COPIES
from fluentllm.kernels.native import library as native
from fluentllm.kernels.native.attention import PagedDecode
from fluentllm.kernels.native.library import Library, NotAvailable
from fluentllm.kernels.native.ops import NativeOps
from fluentllm.kernels.native.pack import TiledWeight
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.quantise import dequantise_blocks
from fluentllm.kernels.weights import TwoWeights

ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40, 70)


BUILDS = {"native": "", "x86-64-v3": "avx2 f16c", "x86-64-v4": "avx512f avx512bw avx512dq avx512vl avx512cd"}
"""What other CPUs get, and the flags of a CPU that can run it: with AVX2, with AVX-512 without products of bytes."""


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    if request.param == "native":
        return native_library()
    missing = set(BUILDS[request.param].split()) - set(cpu_flags())
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    try:
        return native.load(tmp_path_factory.mktemp("kernels"), request.param)
    except NotAvailable as reason:
        pytest.skip(str(reason))


def cpu_flags() -> list[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


@pytest.fixture(scope="module")
def ops(library: Library) -> NativeOps:
    return NativeOps(library)


def blocks(kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """With scales that float16 holds, as those of checkpoints are."""
    if kind == "q4_1":
        parts = {"q": torch.randint(0, 16, (rows, columns), dtype=torch.uint8)}
    else:
        parts = {"q": torch.randint(-128, 128, (rows, columns), dtype=torch.int8)}
    for name in ("d", "m") if kind == "q4_1" else ("d",):
        parts[name] = torch.randn(rows, columns // 32).half().float()
    return parts


def as_multiplied(library: Library, x: torch.Tensor) -> torch.Tensor:
    """x [rows, columns] as the library's products take it: in integers of 16 bits, a step for each 32, or as it is."""
    if not library.multiplies_bytes:
        return x
    groups = x.unflatten(1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    most = torch.tensor(32639.0)  # a number would be multiplied with the reciprocal, which rounds twice
    integers = (groups * (most / largest.clamp(min=1e-30))).round() * (largest > 1e-30)
    return (integers.double() * (largest / most)).flatten(1)


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
@pytest.mark.parametrize("shape", [(16, 32), (48, 64), (80, 576), (272, 1536)])
def test_blocks_keep_their_values_and_products_are_exact_to_rounding(
    library: Library, kind: str, shape: tuple[int, int]
) -> None:
    parts = blocks(kind, *shape)
    if kind == "q4_1":
        parts["m"] = (-8 * parts["d"]).half().float()  # so that m + 8 d - 8 d is m again
    packed = weights.pack_blocks(kind, parts, "packed", library=library)
    assert isinstance(packed, TiledWeight)
    exact = dequantise_blocks(kind, parts)
    torch.testing.assert_close(packed.dequantised(), exact, rtol=0, atol=0)
    bias = torch.randn(shape[0])
    for rows in ROWS:
        x = torch.randn(rows, shape[1]) * torch.logspace(-2, 2, shape[1])
        taken = as_multiplied(library, x).double()
        expected = (taken @ exact.double().T + bias).float()
        found = packed.product(x, bias)
        assert found.shape == expected.shape
        # Rounding is relative to the sizes that are added up. Of these there are up to 1,536 + 48 · 2, in groups.
        sizes = taken.abs() @ exact.double().abs().T + bias.abs()
        assert ((found - expected).abs() <= 2e-6 * sizes).all()


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_products_of_values_far_from_one(library: Library, kind: str) -> None:
    """Zeros give zero, sizes carry over, and what is not a number stays so, in its row only."""
    parts = blocks(kind, 32, 96)
    packed = weights.pack_blocks(kind, parts, "packed", library=library)
    assert packed is not None
    x = torch.randn(7, 96) * torch.tensor([1, 1e-20, 1e20, 0, 1, 1, 1]).unsqueeze(1)
    x[4, 40], x[5, 95], x[6, 0] = float("nan"), float("inf"), -float("inf")
    found = packed.product(x, None)
    expected = x[:4].double() @ dequantise_blocks(kind, parts).double().T
    assert ((found[:4] - expected).abs() <= 1e-3 * expected.abs().amax(1, keepdim=True)).all()
    assert not found[4:].isfinite().any()


@pytest.mark.parametrize(("precision", "error"), [("int4", 0.15), ("int8", 2e-2)])
def test_floats_are_packed_to_tiles(library: Library, precision: str, error: float) -> None:
    matrix = torch.randn(64, 96)
    packed = weights.pack(matrix, precision, library=library)
    assert isinstance(packed, TiledWeight)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 96).to(dtype)
        found = packed.product(x, None)
        assert found.dtype is dtype
        expected = x.float() @ matrix.T
        assert (found.float() - expected).abs().max() <= error * expected.abs().max()
        rounded = as_multiplied(library, x.float()).float() @ packed.dequantised().T
        assert (found.float() - rounded).abs().max() <= (1e-2 if dtype is torch.bfloat16 else 3e-6) * rounded.abs().max()


def test_rows_of_another_width_are_refused(library: Library) -> None:
    packed = weights.pack_blocks("q8_0", blocks("q8_0", 16, 64), "packed", library=library)
    assert isinstance(packed, TiledWeight)
    with pytest.raises(ValueError, match="rows of 32 values"):
        packed.product(torch.randn(2, 64)[:, :32], None)


def test_widths_that_make_no_tiles_go_to_torch(library: Library) -> None:
    for shape in ((24, 64), (7, 24)):
        assert not isinstance(weights.pack(torch.randn(shape), "int8", library=library), TiledWeight)


def test_many_rows_take_the_copy(library: Library) -> None:
    """Where one is faster: products of bytes need none."""
    parts = blocks("q4_1", 64, 64)
    packed = weights.pack_blocks("q4_1", parts, "packed", twice=True, library=library)
    COPIES.wait()
    exact = dequantise_blocks("q4_1", parts)
    half_step = exact.abs().amax(1) / 254  # a copy may round weights to int8 rows
    assert packed is not None
    assert not (library.multiplies_bytes and weights.copy_bytes(packed))
    for rows in (*ROWS, 200, 256, 257, 520):
        x = torch.randn(rows, 64)
        expected = x @ exact.T
        if rows:
            found = packed.product(x, None)
            assert ((found - expected).abs() <= 1.01 * x.abs().sum(1, keepdim=True) * half_step + 1e-3).all()
            taken = (packed.many if rows > packed.border else packed.few) if isinstance(packed, TwoWeights) else packed
            assert taken is not None
            as_taken = x @ taken.dequantised().T
            assert (found - as_taken).abs().max() <= 1e-3 * as_taken.abs().max()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 24, 576, 1000])
def test_norms(ops: NativeOps, rows: int, size: int) -> None:
    plain = PlainOps()
    weight, residual = torch.randn(size), torch.randn(rows, size) * 3
    delta = torch.randn(rows, size)
    torch.testing.assert_close(ops.rms_norm(residual, weight, 1e-5), plain.rms_norm(residual, weight, 1e-5))
    both = residual.clone(), residual.clone()
    found, expected = (o.add_rms_norm(delta, r, weight, 1e-5) for o, r in zip((ops, plain), both, strict=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*both, rtol=0, atol=0)


def test_norms_of_heads_inside_a_wider_row(ops: NativeOps) -> None:
    """Queries and keys are normed as slices of one product: not contiguous."""
    x, weight = torch.randn(3, 10, 16)[:, :6], torch.randn(16)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), PlainOps().rms_norm(x.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("rows", ROWS)
def test_gates(ops: NativeOps, rows: int) -> None:
    x = torch.randn(rows, 2 * 77) * 30
    if rows:
        x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.0])
    torch.testing.assert_close(ops.silu_mul(x), PlainOps().silu_mul(x), rtol=2e-6, atol=1e-6)


def test_what_is_not_a_number_stays_so(ops: NativeOps) -> None:
    x = torch.zeros(1, 32)
    x[0, 3] = x[0, 20] = float("nan")
    assert ops.silu_mul(x).isnan().nonzero()[:, 1].tolist() == [3, 4]
    assert ops.rms_norm(x, torch.ones(32), 1e-5).isnan().all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "size"), [(64, 64), (24, 24), (16, 32)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(ops: NativeOps, rows: int, width: int, size: int, interleaved: bool) -> None:
    x = torch.randn(rows, 7, size)[:, 1:6]
    cos, sin = torch.randn(2, rows, 1, width)
    expected = PlainOps().rotary(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(ops.rotary(x, cos, sin, interleaved=interleaved), expected)


@pytest.mark.parametrize(("queries", "first_key"), [(1, 0), (3, 0), (1, 1), (3, 7)])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "page"), [(9, 3, 64, 16), (8, 8, 128, 5), (6, 1, 40, 1), (4, 2, 64, 64)])
def test_attention_over_scattered_pages(
    library: Library, queries: int, first_key: int, heads: int, kv_heads: int, size: int, page: int
) -> None:
    """A draft layer has no key for a sequence's first token; rows before the first key give anything finite."""
    attend = PagedDecode(library)
    for sequences in (0, 1, 2, 5):
        longest = 70
        width = -(-longest // page)
        table = (torch.randperm(sequences * width) + 1).int().view(sequences, width)
        pools = torch.randn(2, sequences * width + 1, page, kv_heads, size).unbind(0)
        positions = torch.randint(0, longest - queries, (sequences, 1)) + torch.arange(queries)
        sequence = torch.arange(sequences).repeat_interleave(queries)
        flat = positions.view(-1)
        kv_rows = table[sequence, flat // page].long() * page + flat % page
        mixed = torch.randn(sequences * queries, heads + 2 * kv_heads + 1, size)  # as one product leaves them
        q, k, v = mixed[:, :heads], mixed[:, heads : heads + kv_heads], mixed[:, heads + kv_heads : -1]
        found = attend(q, k, v, pools, kv_rows, table, flat, 0.2, first_key)
        assert found.isfinite().all()
        assert found.shape == (sequences * queries, heads, size)
        for number in range(sequences):
            rows = slice(number * queries, (number + 1) * queries)
            keys, values = (gather_rows(pool, table[number], int(positions[number, -1]) + 1) for pool in pools)
            torch.testing.assert_close(keys[-queries:], k[rows], rtol=0, atol=0)
            torch.testing.assert_close(values[-queries:], v[rows], rtol=0, atol=0)
            seeing = positions[number] >= first_key
            places = positions[number][seeing] - first_key
            expected = gqa_reference(q[rows][seeing], keys[first_key:], values[first_key:], places, 0.2)
            torch.testing.assert_close(found[rows][seeing], expected, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_lie_side_by_side_are_refused(library: Library) -> None:
    q = torch.randn(1, 8, 4).transpose(1, 2)
    k = torch.randn(1, 4, 8)
    pools = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="strides"):
        PagedDecode(library)(q, k, k, pools, zero, torch.zeros(1, 1, dtype=torch.int32), zero, 1.0)


def test_they_are_compiled_once(library: Library, tmp_path: Path) -> None:
    """By another process too."""
    code = f"from pathlib import Path; from fluentllm.kernels.native.library import load; load(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    [made] = tmp_path.iterdir()
    written = made.stat().st_mtime_ns
    native.load(tmp_path)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [written]


@pytest.mark.parametrize("trouble", ["no compiler", "a compiler that fails", "a folder that cannot be written"])
def test_without_them_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kernels"
    if trouble == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif trouble == "a compiler that fails":
        broken = tmp_path / "broken-cc"
        broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such target' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
    else:
        folder.write_text("a file")
    caplog.set_level("INFO")
    assert load_library(folder) is None
    assert "torch's operations serve" in caplog.text
    assert type(choose_ops(torch.device("cpu"), False, None)) is PlainOps
    with pytest.raises(NotAvailable):
        native.load(folder)
