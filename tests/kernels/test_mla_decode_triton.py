"""MLA decode's kernels without a GPU: the plain ones in Triton's interpreter, all of them compiled for sm_90a."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

triton = pytest.importorskip("triton")

if TYPE_CHECKING:
    from fluentllm.kernels.triton.launch import Launch

HERE = Path(__file__).parent


def test_plain_kernels_in_the_interpreter() -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environ = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    script = HERE / "mla_decode_interpreted.py"
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


DECODE = {
    "plan_kernel",
    "decode_fp8",
    "decode_fp8_few",
    "decode_fp8_many",
    "decode_bf16",
    "decode_bf16_few",
    "combine_splits",
}
CACHE = {"_append", "_fetch", "_quantise_query", "_append_norms", "_absorb_norms"}
AROUND = {"_absorb_kernel", "combine_splits", "_merge_and_expand"}
"""What the tests below compile."""
SWITCHES = (
    "PAGES_IN_RECORD",
    "MERGE_TOGETHER",
    "SWAP_OPERANDS",
    "VALUES_IN_REGISTERS",
    "LAUNCH_EARLY",
    "FETCH_MAPS",
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(kv: str, heads: int, queries: int) -> list[Launch]:
    """Of a decode of 32 sequences with contexts up to 4,096, as its launchers launch it."""
    from fluentllm.kernels.mla_decode import fp8_planes
    from fluentllm.kernels.mla_decode.decode import MlaDecode
    from fluentllm.kernels.triton.launch import recording

    shape, table = (32, queries, heads), empty(32, 64, dtype=torch.int32)
    with recording() as launches:
        decode = MlaDecode.create(empty(32, dtype=torch.int32), heads, queries, page_table=table)
        out = empty(*shape, 512)
        if kv == "fp8":
            content, factor = empty(*shape, 512, dtype=torch.float8_e4m3fn), empty(*shape, dtype=torch.float32)
            planes = fp8_planes(empty(9, 64, 644, dtype=torch.uint8))
            decode.fp8(content, empty(*shape, 64), factor, planes, table, 0.1, out)
        else:
            decode.bf16(empty(*shape, 512), empty(*shape, 64), empty(9, 64, 576), table, 0.1, out)
    return launches


@pytest.mark.parametrize("on", [(), ("SWAP_OPERANDS",), SWITCHES], ids=["plain", "swapped", "all"])
@pytest.mark.parametrize(
    ("kv", "heads", "queries"),
    [
        ("fp8", 16, 1),
        ("fp8", 16, 4),
        ("fp8", 128, 1),
        ("bf16", 1, 1),
        ("bf16", 16, 1),
        ("bf16", 5, 4),
        ("bf16", 16, 2),
        ("bf16", 16, 4),
        ("bf16", 128, 1),
    ],
)
def test_decode_compiles_for_hopper(
    kv: str, heads: int, queries: int, on: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluentllm.kernels.mla_decode import switches
    from fluentllm.kernels.mla_decode.decode import MOST_SWAPPED
    from fluentllm.kernels.triton.compile import compile_launch

    for name in (*SWITCHES, "CLUSTERS"):
        monkeypatch.setattr(switches, name, name in on)
    launches = launched(kv, heads, queries)
    names = [one.kernel.__name__ for one in launches]
    rows = heads * queries
    swapped = "SWAP_OPERANDS" in on and rows <= MOST_SWAPPED[kv]
    registers = "VALUES_IN_REGISTERS" in on and kv == "fp8" and rows > 16
    decode = f"decode_{kv}" + "_few" * swapped + "_many" * registers
    assert {*names} <= DECODE
    assert names == ["plan_kernel", decode] + ["combine_splits"] * ("MERGE_TOGETHER" not in on)
    compiled = compile_launch(launches[1])
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert ("f32.e4m3.e4m3" in ptx) == (kv == "fp8")
    columns = {int(n) for n in re.findall(r"wgmma.mma_async.sync.aligned.m64n(\d+)k", ptx)}
    assert (columns <= {16, 32}) == swapped
    # Values' products whose first operand is in registers: two warpgroups, four runs of keys, four times 64 columns.
    assert len(re.findall(r"m64n64k16\.f32\.f16\.f16 \{[^}]*\}, \{", ptx)) == 32 * registers
    assert compiled.metadata.shared <= 232_448
    if swapped:
        assert columns == {16 if rows <= 16 else 32}
        assert stack_bytes(compiled, tmp_path) == 0
        # Values are read as they lie: half a page for each of two partitions, four runs of keys, four times 64 columns.
        assert len(re.findall(r"wgmma[^;]*, 1, 1, 1, 0;", ptx)) == 32
        # A wait for each partition's products: ptxas adds others where it finds their sums touched while they run.
        assert disassembled(compiled, tmp_path).count("WARPGROUP.DEPBAR") == 3
    # Four partitions, and each waits for the kernels in front.
    assert ptx.count("griddepcontrol.wait") == (4 if "LAUNCH_EARLY" in on else 0)
    if on == SWITCHES:
        assert ptx.count("atom.acq_rel.gpu") + ptx.count("atom.global.gpu.acq_rel") == 2
        for one in launches:
            assert len(compile_launch(one).asm["cubin"]) > 0


def test_what_fills_and_reads_the_cache_compiles_for_hopper() -> None:
    """As its launchers launch it, on tensors without memory."""
    from fluentllm.kernels.mla_decode import fp8_planes, quantise
    from fluentllm.kernels.mla_decode.append import absorb_norms, append_norms
    from fluentllm.kernels.triton.compile import compile_launch
    from fluentllm.kernels.triton.launch import recording

    planes, rows = fp8_planes(empty(9, 64, 644, dtype=torch.uint8)), empty(8, dtype=torch.int64)
    rotary = empty(8, 1, 64), empty(8, 1, 64)
    with recording() as launches:
        quantise.append(planes, empty(8, 512), empty(8, 64), rows)
        quantise.fetch(planes, rows)
        quantise.fetch(planes, rows, out=empty(64, 576), out_rows=rows)
        for interleaved in (False, True):
            quantise.quantise_query(empty(8, 16, 512), empty(8, 16, 192)[..., 128:], rotary=rotary, interleaved=interleaved)
            given = (empty(8, 2112)[:, 1536:], empty(512), *rotary, rows, planes)
            append_norms(*given, eps=1e-6, interleaved=interleaved)
            for heads in (16, 64):
                up_k = empty(heads, 128, 512)
                absorb_norms(empty(8, heads, 192), up_k, *given, eps=1e-6, latent_scale=2.4, interleaved=interleaved)
        quantise.quantise_query(empty(8, 16, 512), empty(8, 16, 64))
        append_norms(
            empty(8, 576), empty(512), *rotary, rows, planes, eps=1e-6, latent_scale=2.4, plain=empty(64, 576), plain_rows=rows
        )  # fmt: skip
    assert {one.kernel.__name__ for one in launches} == CACHE
    for one in launches:
        assert len(compile_launch(one).asm["cubin"]) > 0


@pytest.mark.parametrize("name", ["hopper_bf16", "hopper_bf16_few"])
def test_a_rotary_part_is_replaced_when_its_page_is_scored(name: str) -> None:
    """It has no barrier of its own: the loader has awaited whoever had the place of its page's second half before."""
    from fluentllm.kernels.mla_decode import hopper_bf16, hopper_bf16_few

    halves = {"hopper_bf16": hopper_bf16, "hopper_bf16_few": hopper_bf16_few}[name].HALVES
    place_of = hopper_bf16.place_of.fn
    for step in range(halves, 50):
        place, parity = place_of(step, 1, halves)
        number = max(n for n in range(2 * step + 1) if place_of(n // 2, n % 2, halves)[0] == place)
        assert place_of(number // 2, number % 2, halves) == (place, parity ^ 1)
        assert number // 2 >= step - halves // 2


def shown(tool: Any, compiled: Any, folder: Path, *options: str) -> str:
    """What one of CUDA's tools prints of a cubin."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([tool.path, *options, str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Of a thread: registers that do not fit are kept there."""
    found = re.search(r"STACK:(\d+)", shown(triton.knobs.nvidia.cuobjdump, compiled, folder, "-res-usage"))
    assert found is not None
    return int(found[1])


def disassembled(compiled: Any, folder: Path) -> str:
    return shown(triton.knobs.nvidia.nvdisasm, compiled, folder, "-c")


@pytest.mark.parametrize("heads", [16, 32, 64])  # DeepSeek-V3-Lite's, LongCat-Flash-Lite's, LongCat's
def test_what_stands_around_the_decode_compiles_for_hopper(heads: int, tmp_path: Path) -> None:
    """As the backends launch it: few splits and many, one token to as many as go this way. Nothing is spilled."""
    from fluentllm.kernels.mla_decode.decode import MlaDecode
    from fluentllm.kernels.triton.compile import compile_launch
    from fluentllm.kernels.triton.launch import recording
    from fluentllm.kernels.triton.mla_absorb import absorb

    for sequences, queries, pages in ((1, 1, 8), (1, 1, 512), (1, 2, 512), (1, 4, 512), (8, 1, 512), (16, 4, 512)):
        shape, tokens = (sequences, queries, heads), sequences * queries
        with recording() as launches:
            absorb(
                empty(tokens, heads, 192), empty(heads, 128, 512), empty(tokens, 2112)[:, 1536:], empty(512),
                empty(tokens, 1, 64), empty(tokens, 1, 64), empty(tokens, dtype=torch.int64), empty(576, 576), eps=1e-6,
                latent_scale=2.4,
            )  # fmt: skip
            decode = MlaDecode.create(empty(sequences, dtype=torch.int32), heads, queries)
            table, up_v = empty(sequences, pages, dtype=torch.int32), empty(heads, 128, 512)
            q, rope, out = empty(*shape, 512), empty(*shape, 64), empty(*shape, 512)
            values = decode.bf16(q, rope, empty(9, 64, 576), table, 0.1, out, up_v)
        assert values.shape == (tokens, heads, 128)
        around = [one for one in launches if one.kernel.__name__ in AROUND]
        assert len(around) == (2 if pages == 8 else 3)
        for one in around:
            compiled = compile_launch(one)
            assert compiled.metadata.shared <= 227 * 1024
            assert stack_bytes(compiled, tmp_path) == 0, (one.kernel.__name__, one.options)
