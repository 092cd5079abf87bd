"""MLA decode of one layer: microseconds, bandwidth, FLOP rate and share of the roofline, for any shapes.

    python benchmarks/kernels/mla_decode.py --heads 16,64 --q-len 1,4 --batch 1,32 --ctx 4096,16384 --kv fp8,bf16 --json FILE

Rows: {heads, q_len, batch, ctx, kv, us, GBps, TFLOPs}, `floor_us`, `share`. The floor is the larger of bytes / 3.0 TB/s (cache,
queries, output) and FLOPs at the rate of the matrix instructions that suit the cache: FP8 for Q K^T over an FP8 latent,
16-bit for the rest. `--uneven` draws lengths between 1 and ctx. Planning, which serves all layers of a step, is timed apart.

`--variants` times the ways of `mla_decode.switches` instead, each checked first (`mla_variants.py`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from timing import COPY_GBPS, MMA8_TFLOPS, MMA16_TFLOPS, Timer

from fluentllm.kernels.mla_decode import fp8_planes, new_fp8_pool, quantise
from fluentllm.kernels.mla_decode.decode import MlaDecode
from fluentllm.kernels.mla_decode.layout import LATENT, PAGE, ROPE, TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

SCALE = (128 + 64) ** -0.5
CHUNK = 1 << 16


@dataclass(frozen=True)
class Shape:
    heads: int
    q_len: int
    batch: int
    ctx: int
    kv: str


class Case:
    """Fresh random inputs of one shape, in scattered pages: latents about 10, rotary values about 100."""

    def __init__(self, shape: Shape, *, uneven: bool, inert: bool = False) -> None:
        """inert: every third sequence has no keys."""
        self.shape = shape
        lengths = torch.randint(1, shape.ctx + 1, (shape.batch,)) if uneven else torch.full((shape.batch,), shape.ctx)
        lengths = lengths.clamp_min(shape.q_len)
        if inert:
            lengths[::3] = 0
        self.tokens = int(lengths.sum())
        self.lengths = lengths.to("cuda", torch.int32)
        counts = -(-lengths // PAGE)
        pages = int(counts.sum()) + 1
        order = torch.randperm(pages - 1).int() + 1
        table = torch.zeros(shape.batch, int(counts.max()), dtype=torch.int32)
        for i, (count, end) in enumerate(zip(counts.tolist(), counts.cumsum(0).tolist(), strict=True)):
            table[i, :count] = order[end - count : end]
        self.table = table.cuda()
        self._fill(pages)
        rows = (shape.batch, shape.q_len, shape.heads)
        self.q_latent = (torch.randn(*rows, LATENT, device="cuda") * 0.1).bfloat16()
        self.q_rope = (torch.randn(*rows, ROPE, device="cuda") * 0.03).bfloat16()
        self.out = torch.empty(*rows, LATENT, dtype=torch.bfloat16, device="cuda")
        self.plan()

    def plan(self) -> None:
        """Afresh, by the switches as they are."""
        self.decode = MlaDecode.create(self.lengths, self.shape.heads, self.shape.q_len, page_table=self.table)

    def _fill(self, pages: int) -> None:
        fp8 = self.shape.kv == "fp8"
        if fp8:
            self.pool = new_fp8_pool(pages, "cuda")
        else:
            self.pool = torch.empty(pages, PAGE, LATENT + ROPE, dtype=torch.bfloat16, device="cuda")
        for start in range(0, pages * PAGE, CHUNK):
            count = min(CHUNK, pages * PAGE - start)
            latent = (torch.randn(count, LATENT, device="cuda") * 3).bfloat16()
            rope = (torch.randn(count, ROPE, device="cuda") * 30).bfloat16()
            if fp8:
                rows = torch.arange(start, start + count, device="cuda")
                quantise.append(fp8_planes(self.pool), latent, rope, rows)
            else:
                flat = self.pool.view(-1, LATENT + ROPE)[start : start + count]
                flat[:, :LATENT], flat[:, LATENT:] = latent, rope

    def runner(self) -> Callable[[], torch.Tensor]:
        """One layer's decode."""
        if self.shape.kv == "bf16":
            return lambda: self.decode.bf16(self.q_latent, self.q_rope, self.pool, self.table, SCALE, self.out)
        content, aligned, scale = quantise.quantise_query(self.q_latent.flatten(0, 1), self.q_rope.flatten(0, 1))
        planes = fp8_planes(self.pool)
        return lambda: self.decode.fp8(content, aligned, scale, planes, self.table, SCALE, self.out)

    def floor(self) -> tuple[float, float, float]:
        """Bytes, FLOPs, least microseconds."""
        shape = self.shape
        rows = shape.heads * shape.q_len
        q_bytes = 2 * ROPE + (LATENT + 4 if shape.kv == "fp8" else 2 * LATENT)
        moved = self.tokens * (TOKEN_BYTES if shape.kv == "fp8" else 2 * (LATENT + ROPE))
        moved += shape.batch * rows * (q_bytes + 2 * LATENT)
        product = 2 * self.tokens * rows
        wide = product * (LATENT + ROPE if shape.kv == "fp8" else 2 * LATENT + ROPE)
        narrow = product * LATENT if shape.kv == "fp8" else 0
        compute = wide / (MMA16_TFLOPS * 1e6) + narrow / (MMA8_TFLOPS * 1e6)
        return moved, wide + narrow, max(moved / (COPY_GBPS * 1e3), compute)


def measure(shape: Shape, timer: Timer, *, uneven: bool) -> dict[str, object]:
    case = Case(shape, uneven=uneven)
    us = timer(case.runner())
    moved, flops, floor = case.floor()
    rates = {"us": round(us, 2), "GBps": round(moved / us / 1e3, 1), "TFLOPs": round(flops / us / 1e6, 1)}
    against = {"floor_us": round(floor, 1), "share": round(floor / us, 3), "plan_us": round(timer(case.decode.refresh), 2)}
    return asdict(shape) | rates | against


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=integers, default=[16, 32, 64, 128])
    parser.add_argument("--q-len", type=integers, default=[1, 2, 4])
    parser.add_argument("--batch", type=integers, default=[32, 128])
    parser.add_argument("--ctx", type=integers, default=[4096])
    parser.add_argument("--kv", type=lambda text: text.split(","), default=["fp8", "bf16"])
    parser.add_argument("--uneven", action="store_true", help="lengths between 1 and ctx")
    parser.add_argument("--variants", action="store_true", help="the ways of mla_decode.switches, side by side")
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    timer = Timer(options.runs)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, a tiny kernel measures {timer.overhead():.1f} us")
    rows: list[dict[str, object]] = []
    if options.variants:
        from mla_variants import compare

        shapes = itertools.product(options.heads, options.q_len, options.batch, options.ctx, options.kv)
        rows = compare([Shape(*shape) for shape in shapes], timer, options.only.split(";") if options.only else None)
        options.heads = []
    for heads, q_len, batch, ctx, kv in itertools.product(options.heads, options.q_len, options.batch, options.ctx, options.kv):
        row = measure(Shape(heads, q_len, batch, ctx, kv), timer, uneven=options.uneven)
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
