"""Experts' products of packed tokens, BF16 and block FP8: tiles of both kernels, beside torch's grouped ones in the same run.

    python benchmarks/kernels/grouped_gemm.py --layers deepseek-v3-lite,longcat-flash-lite --tokens 1,8,32,128 --kinds bf16,fp8
    python benchmarks/kernels/grouped_gemm.py --shape experts=64,top_k=6,hidden=2048,inner=1408 --tokens 32 --json FILE

Rows {layer, kind, tokens, pairs, active, us, GBps, share, TFLOPs, layer_us, small_us, torch_us, torch, error, tile}: `us` of
gate-up and down (in FP8 with the quantisation between them) of routings drawn anew, several of them in one graph; `share` of
the roofline (`rates.py`), counting of the bytes the matrices of the experts that are active; `layer_us` with sorting and
combining, `small_us` of the kernels for a few tokens in place of all that; `torch_us` of what `torch` names twice and SwiGLU
between: torch._grouped_mm, or in FP8 torch._scaled_grouped_mm, which knows one scale a row and none of 128 × 128, with its
activations quantised between by torch's operations; `error` against float32. Tokens choose their experts at random, so that an
expert gets 0 to several times the average.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import triton
from rates import here, write_rows
from shapes import add_shape, named, names, numbers
from sweep import DEVICE, error_of, gbps, line, precompile, rotate

from fluentllm.kernels.block_fp8 import E4M3, LARGEST, LEAST_SCALE, dequantise_rows, dequantise_weight, quantise_weight
from fluentllm.kernels.triton.elementwise import silu_mul
from fluentllm.kernels.triton.fp8_quantise import quantise_rows
from fluentllm.kernels.triton.moe_combine import combine
from fluentllm.kernels.triton.moe_grouped import grouped_down, grouped_gate_up
from fluentllm.kernels.triton.moe_pack import pack
from fluentllm.kernels.triton.moe_persistent import persistent_down, persistent_gate_up
from fluentllm.kernels.triton.moe_small import small_moe
from fluentllm.kernels.triton.moe_sort import sort_by_expert
from fluentllm.kernels.triton.moe_stream import stream_down, stream_gate_up
from fluentllm.kernels.triton.moe_tiles import Tile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from fluentllm.kernels.triton.moe_sort import ExpertTiles


@dataclass(frozen=True)
class Layer:
    """As `--shape` has it."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    zero: int = 0
    """Experts that hand a token on as it is."""
    name: str = ""

    def __post_init__(self) -> None:
        if self.top_k > self.experts + self.zero:
            raise ValueError(f"a token cannot choose {self.top_k} of {self.experts + self.zero} experts")
        if self.hidden % 16 or self.inner % 16:
            raise ValueError(f"hidden and inner must be multiples of 16, for TMA, not {self.hidden} and {self.inner}")

    @property
    def label(self) -> str:
        total = f"{self.experts}+{self.zero}" if self.zero else self.experts
        return self.name or f"{self.top_k}/{total}x{self.hidden}x{self.inner}"

    @property
    def has_blocks(self) -> bool:
        """Do scales of 128 × 128 fit?"""
        return not (self.hidden % 128 or self.inner % 128)


LAYERS = [
    Layer(64, 6, 2048, 1408, name="deepseek-v3-lite"),
    Layer(128, 12, 3072, 1024, zero=64, name="longcat-flash-lite"),
]
KINDS = {"bf16": "torch._grouped_mm", "fp8": "torch._scaled_grouped_mm, rowwise"}
"""And what torch has for them."""
LIMITS = {"bf16": 0.02, "fp8": 0.05}
"""Of our error; in FP8 small matrices come to 0.035."""
TORCH_LIMITS = {"bf16": 0.02, "fp8": 0.12}
"""Of torch's; in FP8 it has quantised once more, by rows."""
ROUTINGS = 4
"""Of one graph; each reads matrices of its own choice."""
SHARED_BYTES = 220 * 1024


@dataclass(frozen=True, slots=True)
class Persistent:
    """`moe_persistent`, with tiles of so many pairs."""

    rows: int


def candidates(layer: Layer, kind: str, tokens: int, quick: bool = False) -> Iterator[Tile | Persistent]:
    """By the pairs of an average expert; quick: the deepest pipelines only."""
    each = tokens * layer.top_k / (layer.experts + layer.zero)
    if kind == "fp8":
        yield from (Persistent(rows) for rows in (16, 32, 64) if each / 2 <= rows <= max(16, 4 * each) or rows == 64 < each)
    rows = [8, 16] if each <= 4 else [16, 32] if each <= 24 else [32, 64] if each <= 48 else [64, 128]
    width = 1 if kind == "fp8" else 2
    shapes = ((32, 128), (64, 128), (128, 128)) if kind == "fp8" else ((32, 256), (64, 128), (128, 64), (128, 128))
    if each > 48 and kind == "bf16":
        shapes = ((128, 64), (256, 64))
    for wide in rows:
        for columns, depth in shapes:
            if wide >= 64 and columns < 128:
                continue
            stages = min(8, SHARED_BYTES // (depth * width * (columns + max(16, wide))))
            warps = 8 if wide * columns >= 128 * 64 else 4
            for count in {stages} if quick else {stages, max(3, stages // 2)}:
                if count >= 3:
                    yield Tile(wide, columns, depth, warps, count, swapped=True)
    if kind == "bf16":
        if each <= 24:
            yield from (Tile(16, 64, 128, 4, 4), Tile(16, 64, 256, 4, 3), Tile(16, 128, 128, 4, 3), Tile(32, 64, 128, 4, 4))
        else:
            yield from (Tile(64, 64, 128, 4, 3), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 4))
            yield from (Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(64, 256, 64, 8, 4))


class Case:
    """The matrices of a layer, `ROUTINGS` times fresh tokens and choices."""

    def __init__(self, layer: Layer, kind: str, device: str) -> None:
        self.layer, self.kind = layer, kind
        shapes = ((layer.experts, 2 * layer.inner, layer.hidden), (layer.experts, layer.hidden, layer.inner))
        self.matrices: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        for count, rows, columns in shapes:
            if kind == "bf16":
                self.matrices.append(torch.randn(count, rows, columns, dtype=torch.bfloat16, device=device) * 0.02)
                self.scales.append(None)
                continue
            matrix = torch.empty(count, rows, columns, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.empty(count, rows // 128, columns // 128, device=device)
            if device != "meta":
                for e in range(count):
                    matrix[e], scale[e] = quantise_weight(torch.randn(rows, columns, device=device) * 0.02)
            self.matrices.append(matrix)
            self.scales.append(scale)

    def draw(self, tokens: int) -> None:
        layer, device = self.layer, self.matrices[0].device
        total = layer.experts + layer.zero
        self.x = [torch.randn(tokens, layer.hidden, device=device).bfloat16() for _ in range(ROUTINGS)]
        # Uneven: some experts are asked for more often than others.
        liking = torch.randn(total, device=device) * 0.5
        self.ids = [(torch.rand(tokens, total, device=device).log().neg().log().neg() + liking).topk(layer.top_k).indices.int()
                    for _ in range(ROUTINGS)]  # fmt: skip
        self.weights = [torch.rand(tokens, layer.top_k, device=device) for _ in range(ROUTINGS)]
        self.inputs: list[tuple[Tensor, Tensor | None]] = [(x, None) for x in self.x]
        if self.kind == "fp8":
            if device.type == "meta":
                q = torch.empty(tokens, layer.hidden, dtype=torch.float8_e4m3fn, device=device)
                self.inputs = [(q, torch.empty(layer.hidden // 128, tokens, device=device))] * ROUTINGS
            else:
                self.inputs = [quantise_rows(x) for x in self.x]

    def products(self, i: int, tiles: ExpertTiles, tile: Tile | Persistent) -> Tensor:
        (x, x_scale), top_k = self.inputs[i], self.layer.top_k
        if isinstance(tile, Persistent):
            first, second = self.scales
            assert first is not None
            assert second is not None
            h = persistent_gate_up(*pack(self.x[i], tiles, top_k), self.matrices[0], first, tiles)
            return persistent_down(*quantise_rows(h), self.matrices[1], second, tiles)
        if not tile.swapped:
            return grouped_down(grouped_gate_up(x, self.matrices[0], tiles, top_k, tile), self.matrices[1], tiles, tile)
        h = stream_gate_up(x, self.matrices[0], tiles, top_k, tile, x_scale=x_scale, w_scale=self.scales[0])
        h, h_scale = (h, None) if self.kind == "bf16" else quantise_rows(h)
        return stream_down(h, self.matrices[1], tiles, tile, x_scale=h_scale, w_scale=self.scales[1])

    def ours(self, tile: Tile | Persistent) -> list[Callable[[], Tensor]]:
        sorted_ = [sort_by_expert(ids, self.layer.experts, tile.rows) for ids in self.ids]
        return [lambda i=i: self.products(i, sorted_[i], tile) for i in range(ROUTINGS)]

    def whole(self, tile: Tile | Persistent) -> list[Callable[[], Tensor]]:
        def run(i: int) -> Tensor:
            tiles = sort_by_expert(self.ids[i], self.layer.experts, tile.rows)
            return combine(self.products(i, tiles, tile), self.x[i], self.weights[i], self.ids[i], self.layer.experts)

        return [lambda i=i: run(i) for i in range(ROUTINGS)]

    def small(self) -> list[Callable[[], Tensor]]:
        return [lambda i=i: small_moe(self.x[i], self.weights[i], self.ids[i], *self.matrices) for i in range(ROUTINGS)]

    def torchs(self) -> tuple[list[Callable[[], Tensor]], Tensor]:
        """And the pairs of the first routing, in the order of its rows."""
        runs, orders = [], []
        for x, ids in zip(self.x, self.ids, strict=True):
            flat = ids.flatten().long()
            order = flat.argsort(stable=True)[: int((flat < self.layer.experts).sum())]
            counts = flat.bincount(minlength=self.layer.experts)[: self.layer.experts]
            make = self._torch_bf16 if self.kind == "bf16" else self._torch_fp8
            runs.append(make(x[order // self.layer.top_k], counts.cumsum(0).int()))
            orders.append(order)
        return runs, orders[0]

    def _torch_bf16(self, rows: Tensor, offsets: Tensor) -> Callable[[], Tensor]:
        first, second = (matrix.transpose(1, 2) for matrix in self.matrices)

        def run() -> Tensor:
            h = torch._grouped_mm(rows, first, offs=offsets)
            return torch._grouped_mm(silu_mul(h), second, offs=offsets)

        return run

    def _torch_fp8(self, rows: Tensor, offsets: Tensor) -> Callable[[], Tensor]:
        (first, first_scale), (second, second_scale) = self.rowwise
        q, scale = quantise_rowwise(rows)

        def product(x: Tensor, x_scale: Tensor, matrix: Tensor, matrix_scale: Tensor) -> Tensor:
            return torch._scaled_grouped_mm(x, matrix.transpose(1, 2), x_scale, matrix_scale, offs=offsets,
                                            out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip

        def run() -> Tensor:
            h = product(q, scale, first, first_scale)
            return product(*quantise_rowwise(silu_mul(h)), second, second_scale)

        return run

    @cached_property
    def rowwise(self) -> list[tuple[Tensor, Tensor]]:
        """The matrices in E4M3 once more, with a scale a row: float32 [experts, rows]."""
        found = []
        for matrix, scale in zip(self.matrices, self.scales, strict=True):
            assert scale is not None
            values, scales = torch.empty_like(matrix), scale.new_empty(matrix.shape[:2])
            for e in range(matrix.shape[0]):
                values[e], scales[e] = quantise_rowwise(dequantise_weight(matrix[e], scale[e]))
            found.append((values, scales))
        return found

    def expected(self) -> tuple[Tensor, Tensor]:
        """Numbers of the pairs (token · K + choice) that are computed, and what comes out, float32, of the first routing."""
        x, x_scale = self.inputs[0]
        values = x.float() if x_scale is None else dequantise_rows(x, x_scale)
        flat = self.ids[0].flatten()
        out = torch.zeros(flat.shape[0], self.layer.hidden, device=x.device)
        for e in flat[flat < self.layer.experts].unique().tolist():
            pairs = (flat == e).nonzero().flatten()
            first, second = (m[e].float() if s is None else dequantise_weight(m[e], s[e])
                             for m, s in zip(self.matrices, self.scales, strict=True))  # fmt: skip
            gate, up = (values[pairs // self.layer.top_k] @ first.T).bfloat16().float().chunk(2, -1)
            h = (F.silu(gate) * up).bfloat16()
            if x_scale is not None:
                h = dequantise_rows(*quantise_rows(h))
            out[pairs] = h.float() @ second.T
        return (flat < self.layer.experts).nonzero().flatten(), out

    def active(self) -> float:
        """Experts with a token, average of the routings."""
        return sum(ids[ids < self.layer.experts].unique().numel() for ids in self.ids) / ROUTINGS


def quantise_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] → E4M3 [T, K] and scale float32 [T]."""
    values = x.float()
    scale = values.abs().amax(-1).clamp_min(LEAST_SCALE) / LARGEST
    return (values / scale.unsqueeze(-1)).to(E4M3), scale


def compile_all(layers: list[Layer], kinds: list[str], tokens: list[int], quick: bool) -> None:
    begin = time.perf_counter()
    runs = []
    for layer in layers:
        for kind in kinds:
            case = Case(layer, kind, "meta")
            for count in tokens:
                case = _copy(case)
                case.draw(count)
                runs += [lambda case=case, tile=tile: case.whole(tile)[0]() for tile in candidates(layer, kind, count, quick)]
    print(f"compiled {precompile(runs)} kernels in {time.perf_counter() - begin:.0f} s", flush=True)


def _copy(case: Case) -> Case:
    other = object.__new__(Case)
    other.__dict__.update(case.__dict__)
    return other


def measure(
    case: Case, tokens: int, quick: bool, pairs: Tensor, expected: Tensor
) -> tuple[float, float, Tile | Persistent, list[tuple[float, float, Tile | Persistent]]] | None:
    """Fastest tile: (microseconds, error, tile, all); tiles that fail or are wrong are named."""
    found = []
    for tile in candidates(case.layer, case.kind, tokens, quick):
        try:
            runs = case.ours(tile)
            error = error_of(runs[0]()[pairs], expected[pairs])
            us = rotate(runs)
        except Exception as failure:
            print(f"  {tile} fails: {str(failure)[:200]}", flush=True)
            continue
        if not error < LIMITS[case.kind]:
            print(f"  {case.layer.label} {case.kind} {tokens} tokens: {tile} is wrong, error {error:.3g}", flush=True)
            continue
        found.append((us, error, tile))
    found.sort(key=lambda one: one[0])
    return (*found[0], found) if found else None


def try_torch(case: Case, expected: Tensor) -> float | None:
    try:
        runs, order = case.torchs()
        error = error_of(runs[0](), expected[order])
        if not error < TORCH_LIMITS[case.kind]:
            raise ValueError(f"error {error:.3g}")
        return rotate(runs)
    except Exception as failure:
        print(f"  {KINDS[case.kind]} fails: {type(failure).__name__}: {str(failure)[:160]}", flush=True)
        return None


def attempt(runs: Callable[[], list[Callable[[], Tensor]]]) -> float | None:
    try:
        return rotate(runs())
    except Exception as failure:
        print(f"  fails: {str(failure)[:160]}", flush=True)
        return None


def row_of(case: Case, tokens: int, quick: bool) -> dict[str, object] | None:
    layer = case.layer
    case.draw(tokens)
    pairs, expected = case.expected()
    best = measure(case, tokens, quick, pairs, expected)
    if best is None:
        return None
    us, error, tile, found = best
    active = case.active()
    computed = sum(int((ids < layer.experts).sum()) for ids in case.ids) / ROUTINGS
    moved = active * 3 * layer.hidden * layer.inner * (1 if case.kind == "fp8" else 2)
    small = attempt(case.small) if case.kind == "bf16" and tokens <= 8 else None
    flops = 6 * computed * layer.hidden * layer.inner
    return {"layer": layer.label, "kind": case.kind, "tokens": tokens, "pairs": computed, "active": active, "us": us,
            "GBps": gbps(moved, us), "share": here().share(us, moved, **{case.kind: flops}), "TFLOPs": flops / us / 1e6,
            "layer_us": rotate(case.whole(tile)), "small_us": small, "torch_us": try_torch(case, expected),
            "torch": KINDS[case.kind], "error": error, "tile": asdict(tile),
            "others": [(round(t, 1), asdict(o)) for t, _, o in found[1:]]}  # fmt: skip


def _named(tile: dict[str, object]) -> str:
    if "swapped" not in tile:
        return f"persistent {tile['rows']}"
    return "{} {rows} x {columns} x {depth} s{stages} w{warps}".format("swapped" if tile["swapped"] else "grouped", **tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {layer.name: layer for layer in LAYERS}
    parser.add_argument("--layers", type=names(known), help=f"of {','.join(known)}; all without --shape")
    add_shape(parser, Layer, "layers")
    parser.add_argument("--kinds", type=names(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 4096])
    parser.add_argument("--quick", action="store_true", help="fewer tiles")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "fp8" in options.kinds and not all(layer.has_blocks for layer in options.shape):
        parser.error("FP8 has scales of 128 x 128: hidden and inner must be multiples of 128, or --kinds bf16")
    begin = time.perf_counter()
    layers = [known[name] for name in named(options.layers, options.shape, known)] + options.shape
    compile_all(layers, options.kinds, options.tokens, options.quick)
    here()
    widths = (18, 5, 6, 8, 7, 8, 8, 6, 8, 9, 8, 8, 8)
    print(line(("layer", "kind", "tokens", "pairs", "active", "us", "GB/s", "share", "TFLOP/s", "layer us", "small us",
                "torch us", "error"), widths))  # fmt: skip
    rows = []
    for layer in layers:
        for kind in options.kinds:
            case = Case(layer, kind, DEVICE)
            for tokens in options.tokens:
                row = row_of(case, tokens, options.quick)
                if row is None:
                    continue
                rows.append(row)
                shown = (layer.label, kind, tokens, row["pairs"], row["active"], row["us"], row["GBps"], f"{row['share']:.2f}")
                also = (row["small_us"], row["torch_us"], f"{row['error']:.1e}")
                print(line((*shown, row["TFLOPs"], row["layer_us"], *also), widths), f" {_named(row['tile'])}", flush=True)
                print(f"      others: {', '.join(f'{us} {_named(tile)}' for us, tile in row['others'][:3])}", flush=True)
            del case
            torch.cuda.empty_cache()
    write_rows(options.json, rows, here())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
