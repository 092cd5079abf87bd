"""Every kernel in CUDA C++ compiles for Hopper, in all configurations that its launcher asks for. Needs no GPU, but NVRTC."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from fluentllm.kernels.cuda import compile as compilation, mla_decode_cluster
from fluentllm.kernels.cuda.compile import compiled, compiler_version
from fluentllm.kernels.cuda.launch import CudaKernel
from fluentllm.kernels.cuda.linear_cluster import ClusterTile, cluster_product, linear_cluster
from fluentllm.kernels.mla_decode import fp8_planes, switches
from fluentllm.kernels.mla_decode.decode import MlaDecode
from fluentllm.kernels.mla_decode.layout import PAGE_BYTES
from fluentllm.kernels.triton.examples import example_launches
from fluentllm.kernels.triton.launch import START_NEXT, recording
from fluentllm.kernels.triton.row_product import RowProduct
from fluentllm.prewarm import key_of

pytestmark = pytest.mark.skipif(compiler_version() is None, reason="NVRTC is missing: pip install 'fluentllm[test]'")
META = torch.device("meta")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def stack_bytes(code: bytes, folder: Path) -> int:
    """Of a thread: registers that do not fit are kept there."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code)
    shown = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    found = re.search(r"STACK:(\d+)", shown.stdout + shown.stderr)
    assert found is not None
    return int(found[1])


def product(tokens: int, rows: int, depth: int, dtype: torch.dtype, *, gated: bool = False) -> RowProduct:
    fp8 = dtype == torch.float8_e4m3fn
    return RowProduct(
        x=torch.empty(tokens, depth, dtype=dtype, device=META),
        weight=torch.empty(rows * (2 if gated else 1), depth, dtype=dtype, device=META),
        out=torch.empty(tokens, rows, dtype=torch.bfloat16 if fp8 else dtype, device=META),
        x_scale=torch.empty(-(-depth // 128), tokens, device=META) if fp8 else None,
        w_scale=torch.empty(-(-rows // 128), -(-depth // 128), device=META) if fp8 else None,
        gated=gated,
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_products_compile_and_spill_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    for tokens, gated in itertools.product((8, 16, 32, 64), (False, True)):
        with recording() as launches:
            cluster_product(product(tokens, 256, 2048, dtype, gated=gated), ClusterTile(tokens, 4))
        (one,) = launches
        code = one.kernel.warmup(*one.args, grid=one.grid, **one.options)
        assert stack_bytes(code, tmp_path) == 0, one.options


@pytest.mark.parametrize(("place", "count"), [(1, 1), (2, 1), (3, 0)])
def test_the_next_kernel_starts_where_it_is_told(
    place: int, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(START_NEXT, "product", place)
    with recording() as launches:
        cluster_product(product(8, 256, 2048, torch.bfloat16), ClusterTile(8, 4))
    (one,) = launches
    code = tmp_path / "kernel.cubin"
    code.write_bytes(one.kernel.warmup(*one.args, grid=one.grid, **one.options))
    shown = subprocess.run([triton.knobs.nvidia.nvdisasm.path, str(code)], capture_output=True, text=True, check=True)
    assert shown.stdout.count("PREEXIT") == count
    assert shown.stdout.count("ACQBULK") >= 1


@pytest.mark.parametrize("latent_first", [False, True])
def test_mla_decode_compiles(latent_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And spills no more than what a loading thread once puts away. Queries may come row by row, as they are quantised."""
    monkeypatch.setattr(switches, "CLUSTERS", True)
    monkeypatch.setattr(switches, "LATENT_FIRST", latent_first)
    pool = torch.empty(4, PAGE_BYTES, dtype=torch.uint8, device=META)
    for heads, queries, name in ((32, 4, "mla_decode_cluster"), (128, 8, "mla_decode_cluster"), (40, 4, "decode_fp8_many")):
        lengths = torch.empty(3, dtype=torch.int32, device=META)
        table = torch.empty(3, 8, dtype=torch.int32, device=META)
        shape = 3 * queries, heads
        q_latent = torch.empty(*shape, 512, dtype=torch.float8_e4m3fn, device=META)
        q_rope, out = (torch.empty(*shape, n, dtype=torch.bfloat16, device=META) for n in (64, 512))
        with recording() as launches:
            decode = MlaDecode.create(lengths, heads, queries, page_table=table)
            decode.fp8(q_latent, q_rope, torch.empty(shape, device=META), fp8_planes(pool), table, 0.1, out)
        one = launches[1]
        assert one.kernel.__name__ == name
        if isinstance(one.kernel, CudaKernel):
            assert len(one.args) == len(one.kernel.params)
            assert one.args[-6:-4] == (heads, heads * queries)
            assert one.grid[0] == decode.plan.parts * -(-heads * queries // 64) <= 132
            assert stack_bytes(one.kernel.warmup(*one.args, grid=one.grid, **one.options), tmp_path) <= 16


def test_sizes_are_those_of_the_source() -> None:
    """What Python must know of a kernel before it is compiled."""
    text = (Path(compilation.__file__).parent / "mla_memory.cuh").read_text()
    found: dict[str, int] = {}
    for name, value in re.findall(r"constexpr int (\w+) = ([^;]+);", text):
        found[name] = eval(value.replace("/", "//"), {}, found)
    assert found["SHARED_BYTES"] == mla_decode_cluster.SHARED_BYTES
    assert (found["ROW_TILE"], found["PANEL"]) == (mla_decode_cluster.ROW_TILE, mla_decode_cluster.PANEL)
    assert found["PAGE_BYTES"] == PAGE_BYTES


def test_examples_launch_it_and_compile() -> None:
    launches = [one for _, one in example_launches() if isinstance(one.kernel, CudaKernel)]
    assert {one.kernel.__name__ for one in launches} == {"linear_cluster"}
    for one in {key_of(one): one for one in launches}.values():
        assert one.kernel.warmup(*one.args, grid=one.grid, **one.options)[:4] == b"\x7fELF"
        assert len(one.args) == len(one.kernel.params)
        assert one.options["shared"] <= 113 * 1024


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with recording() as launches:
        cluster_product(product(3, 256, 2048, torch.bfloat16), ClusterTile(8, 4))
    options = CudaKernel.macros(launches[0].options)
    first = compiled("linear_cluster", options)
    assert len(list(tmp_path.rglob("linear_cluster-*.cubin"))) == 1
    monkeypatch.setattr(compilation, "_compile", None)
    assert compiled("linear_cluster", options) == first


def test_an_error_shows_what_the_compiler_says() -> None:
    with pytest.raises(RuntimeError, match=r"linear_cluster\.cu does not compile(.|\n)*TOKENS"):
        compiled("linear_cluster", (("ELEMENT", 1),))


def test_equal_macros_are_compiled_once() -> None:
    def key(tokens: int, depth: int, splits: int) -> object:
        with recording() as launches:
            cluster_product(product(tokens, 256, depth, torch.bfloat16), ClusterTile(8, splits))
        assert launches[0].kernel is linear_cluster
        return key_of(launches[0])

    assert key(3, 2048, 4) == key(8, 4096, 2)


def test_what_does_not_fit_is_refused() -> None:
    with recording() as launches, pytest.raises(ValueError, match="more splits"):
        cluster_product(product(64, 128, 65536, torch.float8_e4m3fn), ClusterTile(64, 2))
    with recording(), pytest.raises(ValueError, match="fit"):
        cluster_product(product(9, 128, 2048, torch.bfloat16), ClusterTile(8, 2))
    assert not launches
