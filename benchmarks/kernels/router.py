"""The router's product in float32: on tensor cores in several tiles, by the kernel for few tokens, by torch, in one run.

    python benchmarks/kernels/router.py --json FILE
    python benchmarks/kernels/router.py --shape experts=256,hidden=7168 --tokens 64,1024

Rows {model, tokens, wide_us, best_us, best, few_us, torch_us, share, error, torch_error}: `wide_us` in the tile that
`moe_scores_wide.wide_tile` chooses, `best_us` in the fastest, `few_us` by `moe_scores` (up to 2,048 tokens), `torch_us` of the
cast and `F.linear`; `share` of the roofline (`rates.py`) that `wide_us` reaches, counting x, the weights and the logits once,
and the three BF16 products that are one in float32; errors against float64, norm over norm.
One x for all copies of the weights, which are more than L2 holds: as in a step, where a norm has just written x.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import triton
from rates import here, write_rows
from shapes import add_shape, named, names, numbers
from sweep import DEVICE, ROTATED_BYTES, line, precompile, rotate

from fluentllm.kernels.triton import moe_scores
from fluentllm.kernels.triton.moe_scores_wide import WideTile, new_counters, wide_router_logits, wide_tile


@dataclass(frozen=True)
class Router:
    """As `--shape` has it."""

    experts: int
    hidden: int
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or f"{self.experts}x{self.hidden}"


MODELS = [
    Router(64, 2048, "deepseek-v3-lite"),
    Router(192, 3072, "longcat-flash-lite"),
    Router(768, 6144, "longcat-flash"),
]
SHAPES = [(16, 64, 4), (16, 64, 8), (32, 64, 4), (32, 64, 5), (64, 64, 4), (64, 32, 8), (128, 32, 4), (128, 32, 6)]
"""Tokens, depth and stages of a tile."""
PLACES = 132


def candidates(tokens: int, total: int) -> list[WideTile]:
    found = []
    for width, depth, stages in SHAPES:
        tiles = -(-tokens // width) * -(-total // 64)
        found += [WideTile(width, n, depth, stages) for n in (1, 2, 4, 8) if n == 1 or PLACES / 4 <= n * tiles <= 2 * PLACES]
    return [tile for tile in found if -(-tokens // tile.tokens) * -(-total // 64) * tile.splits <= 24 * PLACES]


def compile_all(routers: list[Router], counts: list[int]) -> None:
    meta = torch.device("meta")
    runs = []
    for router in routers:
        total, hidden = router.experts, router.hidden
        weight = torch.empty(total, hidden, device=meta)
        for tokens in counts:
            x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=meta)
            for tile in {*candidates(tokens, total), wide_tile(tokens, total, meta)}:
                runs.append(lambda x=x, weight=weight, tile=tile: wide_router_logits(
                    x, weight, counters=new_counters(meta), tile=tile))  # fmt: skip
    print(f"compiled {precompile(runs)} kernels", flush=True)


def row_of(router: Router, tokens: int) -> dict[str, object]:
    total, hidden = router.experts, router.hidden
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    weights = [torch.randn(total, hidden, device=DEVICE) for _ in range(min(400, -(-ROTATED_BYTES // (4 * total * hidden))))]
    counters = new_counters(x.device)
    exact = F.linear(x.double(), weights[0].double())

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    def wide(tile: WideTile | None) -> float:
        return rotate([lambda w=w: wide_router_logits(x, w, counters=counters, tile=tile) for w in weights])

    times = sorted(((wide(tile), tile) for tile in candidates(tokens, total)), key=lambda one: one[0])
    moved = 2 * x.numel() + 4 * total * (hidden + tokens)
    chosen, tile = wide(None), wide_tile(tokens, total, x.device)
    times = times or [(chosen, tile)]  # so many tokens that nothing else is worth trying
    reached = here().share(chosen, moved, bf16=6.0 * tokens * total * hidden)
    return {"model": router.label, "tokens": tokens, "wide_us": chosen, "tile": asdict(tile),
            "best_us": times[0][0], "best": asdict(times[0][1]), "others": [(round(t, 2), asdict(o)) for t, o in times[1:]],
            "few_us": rotate([lambda w=w: moe_scores.router_logits(x, w) for w in weights]) if tokens <= 2048 else None,
            "torch_us": rotate([lambda w=w: F.linear(x.float(), w) for w in weights]), "share": reached,
            "error": error(wide_router_logits(x, weights[0], counters=counters)),
            "torch_error": error(F.linear(x.float(), weights[0]))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {router.name: router for router in MODELS}
    parser.add_argument("--models", type=names(known), help=f"of {','.join(known)}; all without --shape")
    add_shape(parser, Router, "routers")
    parser.add_argument("--tokens", type=numbers, default=[32, 64, 128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    routers = [known[name] for name in named(options.models, options.shape, known)] + options.shape
    compile_all(routers, options.tokens)
    here()
    widths = (18, 6, 8, 8, 8, 8, 6, 8, 11)
    print(line(("model", "tokens", "wide us", "best us", "few us", "torch us", "share", "error", "torch error"), widths))
    rows = []
    for router in routers:
        for tokens in options.tokens:
            row = row_of(router, tokens)
            rows.append(row)
            best = WideTile(**row["best"])
            shown = (row["wide_us"], row["best_us"], row["few_us"], row["torch_us"], f"{row['share']:.2f}")
            print(line((router.label, tokens, *shown, f"{row['error']:.1e}", f"{row['torch_error']:.1e}"), widths),
                  f" best {best.tokens} x {best.depth} /{best.splits} s{best.stages}", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    write_rows(options.json, rows, here())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")


if __name__ == "__main__":
    main()
