"""Times every matrix product of one SmolLM2-135M step, by kind of weight and number of rows: what `auto` precision rests on.

    python benchmarks/cpu/ops.py --rows 1,8,32,128,512 --threads 2 [--json FILE] [--kinds float32,int4]

Each of the 30 layers has weights of its own, so that they come from where they would in a model. The figure is the median of
the runs, in ms a step. With ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 a newer CPU does as an
older one would, but for FBGEMM, which looks for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fluentllm.hub.cache import cache_folder
from fluentllm.kernels.native import library as native
from fluentllm.kernels.native.pack import TiledWeight
from fluentllm.kernels.quantise import quantise_int8
from fluentllm.kernels.split_int8 import SplitInt8Weight

LAYERS = 30
SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
HEAD = (49152, 576)

Product = Callable[[Tensor], Tensor]
"""x [T, in] → [T, out]."""
Clock = Callable[[], float]


def float32(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def bfloat16(weight: Tensor) -> Product:
    w = weight.bfloat16()
    return lambda x: F.linear(x.bfloat16(), w)


def onednn(weight: Tensor, dtype: torch.dtype) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 1)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, None, "none", [], "")


def fbgemm_fp16(weight: Tensor) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def fbgemm_int8(weight: Tensor) -> Product:
    scale = weight.abs().amax(1) / 127
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    q = torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(q, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def split_int8(weight: Tensor) -> Product:
    """Ours: activations of 16 bits in two halves."""
    packed = SplitInt8Weight(*quantise_int8(weight))
    return lambda x: packed.product(x, None)


def int8(weight: Tensor) -> Product:
    scale = (weight.abs().amax(1) / 127).bfloat16()
    q = (weight / scale.unsqueeze(1)).round().to(torch.int8)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), q, scale)


def int4(weight: Tensor) -> Product:
    q = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scale_zero = (torch.rand(weight.shape[1] // 32, weight.shape[0], 2) / 100).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, scale_zero)


def tiles(weight: Tensor, bits: int) -> Product:
    """Ours: the C kernels."""
    library = native.load(cache_folder() / "kernels")
    rows, groups = weight.shape[0], weight.shape[1] // 32
    scale, zero = torch.rand(rows, groups) / 100, torch.randn(rows, groups) / 100
    q = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    packed = TiledWeight(library, q if bits == 4 else q.to(torch.int8), scale, zero if bits == 4 else None)
    return lambda x: packed.product(x, None)


KINDS: dict[str, Callable[[Tensor], Product]] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "onednn_float32": lambda w: onednn(w, torch.float32),
    "onednn_bfloat16": lambda w: onednn(w, torch.bfloat16),
    "fbgemm_fp16": fbgemm_fp16,
    "fbgemm_int8_dynamic": fbgemm_int8,
    "split_int8": split_int8,
    "tiles4": lambda w: tiles(w, 4),
    "tiles8": lambda w: tiles(w, 8),
    "int8": int8,
    "int4": int4,
}


Times = dict[int, tuple[float, float]]
"""Rows → (layers' products, the head's), ms a step."""


def time_kind(make: Callable[[Tensor], Product], rows: list[int], seconds: float, clock: Clock) -> Times:
    layers = [(make(torch.randn(shape) / 24), shape[1]) for _ in range(LAYERS) for shape in SHAPES.values()]
    head = make(torch.randn(HEAD) / 24)
    times = {}
    for count in rows:
        inputs = {columns: torch.randn(count, columns) for columns in (576, 1536)}

        def all_layers(inputs: dict[int, Tensor] = inputs) -> None:
            for product, columns in layers:
                product(inputs[columns])

        times[count] = (median_ms(all_layers, seconds, clock), median_ms(lambda x=inputs[576]: head(x), seconds / 4, clock))
    return times


def median_ms(work: Callable[[], object], seconds: float, clock: Clock) -> float:
    work()
    runs: list[float] = []
    end = time.perf_counter() + seconds
    while len(runs) < 5 or time.perf_counter() < end:
        start = clock()
        work()
        runs.append(clock() - start)
    return statistics.median(runs) * 1e3


def run_before_others() -> None:
    """Real-time scheduling for all threads of this process: on a busy machine a thread that waits for another would
    otherwise wait for a whole time slice of somebody else."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,128,512")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each figure")
    parser.add_argument("--cpu-time", action="store_true", help="the thread's own time, for a busy machine; needs --threads 1")
    parser.add_argument("--fifo", action="store_true", help="run before all other processes (root, Linux): keep it short")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread only: add --threads 1")
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    rows = [int(count) for count in args.rows.split(",")]
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, {platform.machine()}")
    print(f"{'ms a step, layers + head':22}" + "".join(f"{count:>16}" for count in rows))
    report = {}
    with torch.inference_mode():
        torch.ones(1 << 22).sum()  # starts the workers, so that they are scheduled like this thread
        if args.fifo:
            run_before_others()
        for kind in args.kinds.split(","):
            try:
                times = time_kind(KINDS[kind], rows, args.seconds, clock)
            except (RuntimeError, native.NotAvailable) as error:
                print(f"{kind:22}  cannot run here: {str(error).splitlines()[0]}")
                continue
            report[kind] = {count: {"layers_ms": layer, "head_ms": head} for count, (layer, head) in times.items()}
            print(f"{kind:22}" + "".join(f"{f'{layer:.1f} + {head:.1f}':>16}" for layer, head in times.values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "torch": torch.__version__, "products": report}, indent=1))


if __name__ == "__main__":
    main()
