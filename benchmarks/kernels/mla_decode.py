"""MLA decode of one layer: microseconds, bandwidth, FLOP rate and share of the roofline, for any shapes.

    python benchmarks/kernels/mla_decode.py --heads 16,64 --q-len 1,4 --batch 1,32 --ctx 4096,16384 --kv fp8,bf16 --json FILE

Rows: {heads, q_len, batch, ctx, kv, us, GBps, TFLOPs}, `floor_us`, `share`, and what others take in the same run, `torch_us`
and `flashinfer_us`, over a BF16 cache of the same values also where ours is FP8 (`mla_others.py`; `--alone` leaves them out).
The floor is the larger of bytes (cache, queries, output) at a copy's rate and FLOPs at the rate of the matrix instructions
that suit the cache: FP8 for Q K^T over an FP8 latent, 16-bit for the rest; the rates are measured first (`rates.py`).
`--uneven` draws lengths between 1 and ctx. Planning, which serves all layers of a step, is timed apart.

`--variants` times the ways of `mla_decode.switches` instead, each checked first (`mla_variants.py`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from mla_others import (
    MOST_BYTES,
    bf16_tokens,
    dense_bytes,
    dense_keys,
    flashinfer_decode,
    flashinfer_wrapper,
    torch_decode,
)
from rates import here, write_rows
from shapes import names, numbers
from sweep import error_of, line
from timing import Timer

from fluentllm.kernels.mla_decode import fp8_planes, new_fp8_pool, quantise
from fluentllm.kernels.mla_decode.decode import MlaDecode
from fluentllm.kernels.mla_decode.layout import LATENT, PAGE, ROPE, TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

SCALE = (128 + 64) ** -0.5
CHUNK = 1 << 16
MOST_HEADS, MOST_ROWS = 128, 8
"""Of `MlaDecode`."""
LIMITS = {"bf16": 0.02, "fp8": 0.1}
"""Of what another's result may differ from ours by: ours over FP8 has quantised queries too."""
COLUMNS = {"heads": 5, "q_len": 5, "batch": 5, "ctx": 6, "kv": 4, "us": 8, "GBps": 7, "TFLOPs": 7, "floor_us": 8, "share": 6,
           "plan_us": 7, "torch_us": 9, "flashinfer_us": 13}  # fmt: skip


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

    @cached_property
    def bf16_pool(self) -> torch.Tensor:
        """[pages, 64, 576]: the cache, in BF16 also where it is FP8."""
        return self.pool if self.shape.kv == "bf16" else bf16_tokens(fp8_planes(self.pool))

    def by_torch(self) -> Callable[[], torch.Tensor] | None:
        """None where it would take too much memory."""
        longest = int(self.lengths.max())
        if dense_bytes(self.shape.batch, self.shape.heads * self.shape.q_len, longest) > MOST_BYTES:
            return None
        keys = dense_keys(self.bf16_pool, self.table, longest)
        return torch_decode(self.q_latent, self.q_rope, keys, self.lengths, SCALE)

    def by_flashinfer(self) -> Callable[[], torch.Tensor] | None:
        """None where there is no FlashInfer."""
        make = flashinfer_wrapper()
        if make is None:
            return None
        return flashinfer_decode(make, self.q_latent, self.q_rope, self.bf16_pool, self.table, self.lengths, SCALE)

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
        return moved, wide + narrow, here().floor_us(moved, bf16=wide, fp8=narrow)


def measure(shape: Shape, timer: Timer, *, uneven: bool, alone: bool) -> dict[str, object]:
    case = Case(shape, uneven=uneven)
    run = case.runner()
    us = timer(run)
    moved, flops, floor = case.floor()
    rates = {"us": round(us, 2), "GBps": round(moved / us / 1e3, 1), "TFLOPs": round(flops / us / 1e6, 1)}
    against = {"floor_us": round(floor, 1), "share": round(floor / us, 3), "plan_us": round(timer(case.decode.refresh), 2)}
    return asdict(shape) | rates | against | ({} if alone else others(case, run().float(), timer))


def others(case: Case, ours: torch.Tensor, timer: Timer) -> dict[str, float | None]:
    """None for who cannot do it, or does something else than we."""
    found: dict[str, float | None] = {}
    for name, make in (("torch", case.by_torch), ("flashinfer", case.by_flashinfer)):
        found[f"{name}_us"] = None
        try:
            run = make()
            if run is None:
                continue
            error = error_of(run(), ours)
            if not error < LIMITS[case.shape.kv]:
                raise ValueError(f"its result differs from ours by {error:.1e}")
            found[f"{name}_us"] = round(timer(run), 2)
        except Exception as failure:
            print(f"  {name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=numbers, default=[16, 32, 64, 128])
    parser.add_argument("--q-len", type=numbers, default=[1, 2, 4])
    parser.add_argument("--batch", type=numbers, default=[32, 128])
    parser.add_argument("--ctx", type=numbers, default=[4096])
    parser.add_argument("--kv", type=names(LIMITS), default=["fp8", "bf16"])
    parser.add_argument("--uneven", action="store_true", help="lengths between 1 and ctx")
    parser.add_argument("--alone", action="store_true", help="without torch and FlashInfer")
    parser.add_argument("--variants", action="store_true", help="the ways of mla_decode.switches, side by side")
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if max(options.heads) > MOST_HEADS or max(options.q_len) > MOST_ROWS or min(options.ctx) < max(options.q_len):
        parser.error(f"--heads goes up to {MOST_HEADS}, --q-len up to {MOST_ROWS}, and --ctx counts the rows of --q-len too")
    timer = Timer(options.runs)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, a tiny kernel measures {timer.overhead():.1f} us")
    here()
    rows: list[dict[str, object]] = []
    if options.variants:
        from mla_variants import compare

        shapes = itertools.product(options.heads, options.q_len, options.batch, options.ctx, options.kv)
        rows = compare([Shape(*shape) for shape in shapes], timer, options.only.split(";") if options.only else None)
    else:
        widths = list(COLUMNS.values())
        print(line(COLUMNS, widths), flush=True)
        for shape in itertools.product(options.heads, options.q_len, options.batch, options.ctx, options.kv):
            row = measure(Shape(*shape), timer, uneven=options.uneven, alone=options.alone)
            rows.append(row)
            shown = row | {"share": f"{row['share']:.2f}"}
            print(line((shown.get(name) for name in COLUMNS), widths), flush=True)
    write_rows(options.json, rows, here())


if __name__ == "__main__":
    main()
