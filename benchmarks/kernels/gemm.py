"""Products of few rows, BF16 and block FP8: our streaming kernel in every tile that fits, beside torch in the same run.

    python benchmarks/kernels/gemm.py --models qwen3-0.6b,llama-3.1-8b --tokens 1,8,32 --kinds bf16,fp8 --json FILE
    python benchmarks/kernels/gemm.py --shape rows=2048,depth=6144 rows=4096,depth=4096,gated --tokens 1,8

Rows {name, kind, rows, depth, gated, tokens, us, GBps, share, torch_us, error, tile}: `us` of one product in a rotation of more
weights than L2 holds; `share` of the roofline, counting of the bytes the weights only (`rates.py`); `torch_us` of F.linear in
BF16 (with SwiGLU's kernel behind it where ours has it inside), or cuBLAS with block scales in FP8; `error` against float32 on
the same operands. In FP8 `with_quantise` is the time with the quantisation of the activations in front of each product.
`--large` measures FP8 products of many rows instead. `--table` prints what `linear_tiles.MEASURED` should hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import triton
from rates import here, write_rows
from shapes import add_shape, named, names, numbers
from sweep import DEVICE, copies_for, error_of, gbps, line, precompile, rotate

from fluentllm.kernels.block_fp8 import linear_reference, quantise_weight
from fluentllm.kernels.cuda.linear_cluster import ClusterTile
from fluentllm.kernels.fp8_library import ROWS, library_product, library_scale
from fluentllm.kernels.triton.elementwise import silu_mul
from fluentllm.kernels.triton.fp8_quantise import quantise_rows
from fluentllm.kernels.triton.hopper_tiles import HopperTile, fits
from fluentllm.kernels.triton.launch import power_of_2
from fluentllm.kernels.triton.linear import linear, new_counters
from fluentllm.kernels.triton.linear_tiles import LinearTile, Tile, streamed_tile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """As `--shape` has it."""

    rows: int
    """Of the result: half of the matrix's where it is gated."""
    depth: int
    gated: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.depth % 16:
            raise ValueError(f"depth must be a multiple of 16, for TMA, not {self.depth}")

    @property
    def label(self) -> str:
        return self.name or f"{self.rows}x{self.depth}{' gated' if self.gated else ''}"


# name: (rows, depth, gated) of `Matrix`.
MODELS: dict[str, dict[str, tuple[int, int, bool]]] = {
    "qwen3-0.6b": {
        "qkv": (4096, 1024, False),
        "o": (1024, 2048, False),
        "gate_up": (3072, 1024, True),
        "down": (1024, 3072, False),
        "head": (151936, 1024, False),
    },
    "llama-3.1-8b": {
        "qkv": (6144, 4096, False),
        "o": (4096, 4096, False),
        "gate_up": (14336, 4096, True),
        "down": (4096, 14336, False),
        "head": (128256, 4096, False),
    },
    "deepseek-v3-lite": {
        "qkv_a": (2112, 2048, False),
        "q_b": (3072, 1536, False),
        "o": (2048, 2048, False),
        "shared_gate_up": (2816, 2048, True),
        "shared_down": (2048, 2816, False),
        "dense_gate_up": (10944, 2048, True),
        "head": (102400, 2048, False),
    },
    "longcat-flash-lite": {
        "qkv_a": (2112, 3072, False),
        "q_b": (6144, 1536, False),
        "o": (3072, 4096, False),
        "gate_up": (6144, 3072, True),
        "down": (3072, 6144, False),
        "head": (131072, 3072, False),
    },
    "longcat": {
        "dense_down": (6144, 12288, False),
        "qkv_a": (2112, 6144, False),
        "expert_gate": (2048, 6144, False),
        "4096": (4096, 4096, False),
    },
}
KINDS = ("bf16", "fp8")
TOKENS = [1, 4, 8, 16, 32, 64, 128]
SHARED_BYTES = 220 * 1024


@dataclass(frozen=True)
class Shape:
    name: str
    kind: str
    rows: int
    depth: int
    gated: bool

    @property
    def width(self) -> int:
        return 1 if self.kind == "fp8" else 2

    @property
    def matrix_rows(self) -> int:
        return 2 * self.rows if self.gated else self.rows

    @property
    def nbytes(self) -> int:
        return self.matrix_rows * self.depth * self.width

    def share(self, tokens: int, us: float) -> float:
        """Of the roofline, the weights being all that is read."""
        return here().share(us, self.nbytes, **{self.kind: 2.0 * tokens * self.matrix_rows * self.depth})


def candidates(shape: Shape, tokens: int) -> Iterator[Tile]:
    """Tiles worth trying for `tokens` rows."""
    if tokens <= 64:
        yield from _hopper(shape, tokens)
    yield from _of_width(shape, tokens, min(64, max(8, power_of_2(tokens))))
    if tokens > 64:
        yield from _of_width(shape, tokens, 128)


def _hopper(shape: Shape, tokens: int) -> Iterator[HopperTile | ClusterTile]:
    """Whole tiles, of which a program may have several, and tiles that programs of a cluster share."""
    wide, tiles = max(8, power_of_2(tokens)), -(-shape.rows // 64)
    whole = (HopperTile(wide, unit, n) for unit in (1, 2, 4) for n in {1, 2, -(-tiles // 264)} if tiles >= 40 * n)
    yield from (tile for tile in whole if fits(tile, shape.depth, shape.width, shape.gated))
    shared = (ClusterTile(wide, n) for n in (2, 3, 4, 5, 6, 8) if 40 <= tiles * n <= 264)
    yield from (tile for tile in shared if tile.fits(tokens, shape.depth, shape.width, shape.gated))


def _of_width(shape: Shape, tokens: int, wide: int) -> Iterator[LinearTile]:
    """Those of `wide` tokens."""
    parts = 2 if shape.gated else 1
    sizes = ((16, 128), (32, 128), (64, 128), (128, 128)) if shape.kind == "fp8" else (
        (16, 256), (32, 128), (32, 256), (64, 64), (64, 128), (128, 64))  # fmt: skip
    for tile_rows, step in sizes:
        if wide >= 32 and tile_rows == 16:
            continue  # every program would read all of x for 16 rows
        room = SHARED_BYTES // (step * shape.width * (parts * tile_rows + max(wide, 16)))
        stages = min(room // 2 if room >= 6 else room, 8)
        if stages < 3:
            continue
        columns = -(-shape.rows // tile_rows) * -(-tokens // wide)
        for splits in (1, 2, 4, 8):
            programs = columns * splits
            if splits > 1 and (shape.gated or programs > 300 or shape.depth < 2 * splits * step):
                break
            if programs >= 44 or (splits == 8 or shape.depth < 4 * splits * step):
                yield LinearTile(wide, tile_rows, step, splits, stages, 8 if tile_rows == 128 and wide >= 32 else 4)


def by_rule(shape: Shape, tokens: int) -> Tile:
    return streamed_tile(tokens, shape.rows, shape.depth, shape.width, shape.gated, torch.device(DEVICE))


def variants(tile: Tile, shape: Shape) -> Iterator[LinearTile]:
    """What else to try with the best tile."""
    if not isinstance(tile, LinearTile):
        return
    row = shape.depth * shape.width // 256
    for prefetch in (4, 16):
        if prefetch <= max(4, row // tile.splits):
            yield replace(tile, prefetch=prefetch)
    yield replace(tile, tma=False)
    parts, stage = (2 if shape.gated else 1), tile.depth * shape.width
    deeper = min(12, SHARED_BYTES // (stage * (parts * tile.rows + max(tile.tokens, 16))))
    if deeper > tile.stages:
        yield replace(tile, stages=deeper)


class Case:
    """Fresh random operands of one shape and number of tokens."""

    def __init__(self, shape: Shape, tokens: int, device: str, copies: int) -> None:
        self.shape = shape
        at = {"device": device}
        self.counters = new_counters(shape.matrix_rows, torch.device(device))
        self.x = torch.randn(tokens, shape.depth, **at).bfloat16()
        self.weights, self.scales = [], []
        for _ in range(copies):
            if shape.kind == "fp8" and device == "meta":
                self.weights.append(torch.empty(shape.matrix_rows, shape.depth, dtype=torch.float8_e4m3fn, **at))
                self.scales.append(torch.empty(-(-shape.matrix_rows // 128), -(-shape.depth // 128), **at))
                continue
            weight = torch.randn(shape.matrix_rows, shape.depth, dtype=torch.bfloat16, **at) * 0.02
            if shape.kind == "fp8":
                weight, scale = quantise_weight(weight)
                self.scales.append(scale)
            self.weights.append(weight)
        self.q: Tensor | None = None
        self.x_scale: Tensor | None = None
        if shape.kind == "fp8" and device == "meta":
            self.q = torch.empty(tokens, shape.depth, dtype=torch.float8_e4m3fn, **at)
            self.x_scale = torch.empty(-(-shape.depth // 128), tokens, **at)
        elif shape.kind == "fp8":
            self.q, self.x_scale = quantise_rows(self.x)
            self.padded = quantise_rows(self.x, ROWS)

    def with_tokens(self, tokens: int) -> Case:
        """The same weights under other rows."""
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        other.x = torch.randn(tokens, self.shape.depth, device=self.x.device).bfloat16()
        if self.q is not None:
            other.q, other.x_scale = quantise_rows(other.x)
            other.padded = quantise_rows(other.x, ROWS)
        return other

    def ours(self, tile: Tile | None, *, quantise: bool = False) -> list[Callable[[], Tensor]]:
        return [partial(self._product, i, tile, quantise) for i in range(len(self.weights))]

    def _product(self, i: int, tile: Tile | None, quantise: bool) -> Tensor:
        options = {"gated": self.shape.gated, "counters": self.counters, "tile": tile}
        if self.q is None:
            return linear(self.x, self.weights[i], **options)
        q, scale = quantise_rows(self.x) if quantise else (self.q, self.x_scale)
        return linear(q, self.weights[i], x_scale=scale, w_scale=self.scales[i], **options)

    def torchs(self) -> list[Callable[[], Tensor]]:
        return [partial(self._torch_product, i) for i in range(len(self.weights))]

    def _torch_product(self, i: int) -> Tensor:
        if self.q is None:
            y = F.linear(self.x, self.weights[i])
        else:
            scale = library_scale(self.weights[i], self.scales[i])
            assert scale is not None, "cuBLAS has no block scales here"
            y = library_product(*self.padded, self.weights[i], scale, torch.bfloat16)
        return silu_mul(y) if self.shape.gated else y

    def expected(self) -> Tensor:
        if self.q is None:
            y = self.x.float() @ self.weights[0].float().T
        else:
            y = linear_reference(self.q, self.x_scale, self.weights[0], self.scales[0])
        if not self.shape.gated:
            return y
        gate, up = y.bfloat16().float().chunk(2, -1)
        return F.silu(gate) * up


def measure(case: Case, tiles: list[Tile], expected: Tensor) -> list[tuple[float, float, Tile]]:
    """(microseconds, error, tile), fastest first; tiles that do not run or are wrong are named and left out."""
    found = []
    for tile in tiles:
        runs = case.ours(tile)
        try:
            error = error_of(runs[0](), expected)
            us = rotate(runs)
        except Exception as failure:
            print(f"  {case.shape.name}: {tile} fails: {str(failure)[:200]}", flush=True)
            continue
        if not error < 0.02:
            print(f"  {case.shape.name} {case.x.shape[0]} tokens: {tile} is wrong, error {error:.3g}", flush=True)
            continue
        found.append((us, error, tile))
    return sorted(found, key=lambda one: one[0])


def try_torch(case: Case) -> float | None:
    try:
        return rotate(case.torchs())
    except Exception as failure:
        print(f"  {case.shape.name}: torch fails: {str(failure)[:160]}", flush=True)
        return None


def compile_all(shapes: list[Shape], tokens: list[int], tiles: Callable[[Shape, int], list[Tile]]) -> None:
    begin = time.perf_counter()
    runs = []
    for shape in shapes:
        for count in tokens:
            case = Case(shape, count, "meta", 1)
            runs += [run for tile in tiles(shape, count) for run in case.ours(tile)]
    print(f"compiled {precompile(runs)} kernels in {time.perf_counter() - begin:.0f} s", flush=True)


def few_rows(shapes: list[Shape], tokens: list[int], *, quick: bool) -> list[dict[str, object]]:
    compile_all(shapes, tokens, lambda shape, count: [*candidates(shape, count), by_rule(shape, count)])
    here()
    best: dict[tuple[Shape, int], list[tuple[float, float, Tile]]] = {}
    cases = {}
    for shape in shapes:
        whole = Case(shape, 1, DEVICE, copies_for(shape.nbytes))
        for count in tokens:
            case = cases[shape, count] = whole.with_tokens(count)
            best[shape, count] = measure(case, list(candidates(shape, count)), case.expected())
    if not quick:
        compile_all(
            shapes, tokens, lambda shape, count: [v for _, _, tile in best[shape, count][:1] for v in variants(tile, shape)]
        )
    widths = (16, 5, 7, 6, 6, 8, 8, 6, 8, 8, 8, 8)
    header = ("name", "kind", "rows", "depth", "tokens", "us", "GB/s", "share", "torch us", "by rule", "quant us", "error")
    print(line(header, widths))
    rows = []
    for (shape, count), case in cases.items():
        found = best[shape, count]
        if found and not quick:
            found = sorted(found + measure(case, list(variants(found[0][2], shape)), case.expected()), key=lambda one: one[0])
        if not found:
            continue
        us, error, tile = found[0]
        rule_us = rotate(case.ours(by_rule(shape, count)))
        quantised = rotate(case.ours(tile, quantise=True)) if shape.kind == "fp8" else None
        row = asdict(shape) | {"tokens": count, "us": us, "GBps": gbps(shape.nbytes, us),
                               "share": shape.share(count, us),
                               "torch_us": try_torch(case), "rule_us": rule_us, "with_quantise": quantised, "error": error,
                               "tile": repr(tile),
                               "runners_up": [(round(t, 2), repr(s)) for t, _, s in found[1:4]]}  # fmt: skip
        rows.append(row)
        shown = (shape.name, shape.kind, shape.matrix_rows, shape.depth, count, us, row["GBps"], f"{row['share']:.2f}")
        print(line((*shown, row["torch_us"], rule_us, quantised, f"{error:.1e}"), widths),
              f" {shown_tile(tile)}", flush=True)  # fmt: skip
    return rows


def shown_tile(tile: Tile) -> str:
    if not isinstance(tile, LinearTile):
        return repr(tile)
    ends = f"{'' if tile.tma else ' cp.async'}{f' pf{tile.prefetch}' if tile.prefetch else ''}"
    return f"{tile.rows}x{tile.depth} m{tile.tokens} s{tile.stages} /{tile.splits} w{tile.warps}{ends}"


def table(rows: list[dict[str, object]]) -> str:
    """`MEASURED` for `linear_tiles`."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        key = f"({row['rows']}, {row['depth']}, {1 if row['kind'] == 'fp8' else 2}, {row['gated']})"
        lines.setdefault(key, []).append(f"{row['tokens']}: {row['tile']}")
    return "\n".join(f"    {key}: {{{', '.join(values)}}}," for key, values in lines.items())


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    models = named(options.models, options.shape, MODELS)
    found = [Shape(f"{model[:4]}.{name}", kind, *size) for kind in options.kinds for model in models
             for name, size in MODELS[model].items()
             if (kind == "bf16" and model != "longcat") or (kind == "fp8" and name != "head")]  # fmt: skip
    return found + [Shape(one.label, kind, one.rows, one.depth, one.gated) for kind in options.kinds for one in options.shape]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names(MODELS), help=f"of {','.join(MODELS)}; all without --shape")
    add_shape(parser, Matrix, "matrices")
    parser.add_argument("--kinds", type=names(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", type=numbers, help=f"{','.join(map(str, TOKENS))} unless given")
    parser.add_argument("--quick", action="store_true", help="first tiles only, no variants of the best")
    parser.add_argument("--large", action="store_true", help="FP8 products of many rows, of --shape and --tokens or of a set")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "fp8" in options.kinds and any(one.gated and one.rows % 128 for one in options.shape):
        parser.error("FP8 has scales of 128 x 128: gated rows must be a multiple of 128, or --kinds bf16")
    if options.large and any(one.gated for one in options.shape):
        parser.error("products of many rows are not gated: leave out `gated` with --large")
    begin = time.perf_counter()
    if options.large:
        from gemm_large import SHAPES, many_rows

        sizes = [(count, one.rows, one.depth) for one in options.shape for count in options.tokens or [4096]]
        rows = many_rows(sizes or SHAPES)
    else:
        rows = few_rows(chosen_shapes(options), options.tokens or TOKENS, quick=options.quick)
    if options.table:
        print(table(rows))
    write_rows(options.json, rows, here())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
