"""MLA decode's kernels without a GPU: the plain ones in Triton's interpreter, all of them compiled for sm_90a."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

HERE = Path(__file__).parent


def test_plain_kernels_in_the_interpreter() -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environ = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    script = HERE / "mla_decode_interpreted.py"
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def descriptor(dtype: str, block: list[int], bits: int, swizzle: int = 128) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{dtype}[{','.join(map(str, block))}],{layout!r}>"


PLAN = {
    "page_table": "*i32",
    "lengths": "*i32",
    "starts": "*i32",
    "records": "*i32",
    "scale_log2": "fp32",
    "table_width": "i32",
}
OUTPUT = {"out": "*bf16", "partial": "*fp32", "lse": "*fp32"}
ROPE_QUERY = {"qr_desc": descriptor("bf16", [64, 64], 16)}
FP8 = (
    {"q8": "*fp8e4nv"}
    | ROPE_QUERY
    | {"k8_desc": descriptor("fp8e4nv", [1, 64, 128], 8), "kr_desc": descriptor("bf16", [1, 64, 64], 16)}
    | {"ks_desc": descriptor("fp32", [1, 64], 32, swizzle=0), "q_scale": "*fp32"}
    | OUTPUT
    | PLAN
)
BF16 = (
    {"q_desc": descriptor("bf16", [64, 512], 16)}
    | ROPE_QUERY
    | {"kv_desc": descriptor("bf16", [1, 64, 256], 16), "kr_desc": descriptor("bf16", [1, 64, 64], 16)}
    | OUTPUT
    | PLAN
)


@pytest.mark.parametrize(("kv", "rows"), [("fp8", 16), ("fp8", 128), ("bf16", 128)])
def test_decode_compiles_for_hopper(kv: str, rows: int) -> None:
    from fluentllm.kernels.mla_decode import hopper_bf16, hopper_fp8

    kernel, signature, stages = (
        (hopper_fp8.decode_fp8, FP8, hopper_fp8.STAGES) if kv == "fp8" else (hopper_bf16.decode_bf16, BF16, hopper_bf16.STAGES)
    )
    constants = {"HEADS": 16, "ROWS": rows, "GROUPS": -(-rows // 64), "NUM_STAGES": stages, "PDL": True}
    if kv == "fp8":
        constants["TILE"] = min(rows, 64)
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_.startswith("*")}
    source = GluonASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert ("f32.e4m3.e4m3" in ptx) == (kv == "fp8")
    assert compiled.metadata.shared <= 232_448
    assert len(compiled.asm["cubin"]) > 0


def test_plain_kernels_compile_for_hopper() -> None:
    from fluentllm.kernels.mla_decode import combine, plan

    cases = {
        combine.combine_splits: (
            {"out": "*bf16", "partial": "*fp32", "lse": "*fp32", "spans": "*i32"},
            {"ROWS": 16, "COLUMNS": 512, "SPLITS": 8, "MOST": 1, "PDL": 1},
        ),
        plan.plan_kernel: (
            {"lengths": "*i32", "starts": "*i32", "spans": "*i32", "records": "*i32", "count": "i32"},
            {"PARTS": 132, "OVERHEAD": 2, "PAGE": 64, "STEPS": 20, "BLOCK": 128},
        ),
    }
    for kernel, (signature, constants) in cases.items():
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
        assert len(compiled.asm["cubin"]) > 0


def test_what_fills_and_reads_the_cache_compiles_for_hopper() -> None:
    """As its launchers launch it, on tensors without memory."""
    from fluentllm.kernels.mla_decode import fp8_planes, quantise
    from fluentllm.kernels.mla_decode.append import absorb_norms, append_norms
    from fluentllm.kernels.triton.compile import compile_launch
    from fluentllm.kernels.triton.launch import recording

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

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
    names = {"_append", "_fetch", "_quantise_query", "_append_norms", "_absorb_norms"}
    assert {one.kernel.__name__ for one in launches} == names
    for one in launches:
        assert len(compile_launch(one).asm["cubin"]) > 0


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Of a thread: registers that do not fit are kept there."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    shown = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", shown.stdout + shown.stderr)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("heads", [16, 32, 64])  # DeepSeek-V3-Lite's, LongCat-Flash-Lite's, LongCat's
def test_what_stands_around_the_decode_compiles_for_hopper(heads: int, tmp_path: Path) -> None:
    """As the backends launch it: few splits and many, one token to as many as go this way. Nothing is spilled."""
    from fluentllm.kernels.mla_decode.decode import MlaDecode
    from fluentllm.kernels.triton.compile import compile_launch
    from fluentllm.kernels.triton.launch import recording
    from fluentllm.kernels.triton.mla_absorb import absorb

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kernels = {"_absorb_kernel", "combine_splits", "_merge_and_expand"}
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
        around = [one for one in launches if one.kernel.__name__ in kernels]
        assert len(around) == (2 if pages == 8 else 3)
        for one in around:
            compiled = compile_launch(one)
            assert compiled.metadata.shared <= 227 * 1024
            assert stack_bytes(compiled, tmp_path) == 0, (one.kernel.__name__, one.options)
