"""Attention backends side by side, over page sizes: one layer, microseconds, as `attention.backend: auto` measures it.

    python benchmarks/kernels/attention.py --pages 16,32,64 --models qwen3-0.6b,llama-3.1-8b --json FILE
    python benchmarks/kernels/attention.py --shape heads=32,kv_heads=8,head_dim=128 --batch 1,64 --ctx 4096 --phases decode

Decode is a captured pass of eight calls (`--batch`, `--q-len`, `--ctx` say of what), prefill is one prompt, launched call by
call (`--new` tokens behind `--cached` ones). In parentheses is the share of the roofline (`rates.py`), counting keys, values,
queries and results once. All calls read the same KV: where that fits into L2 it stays there, and a share can pass 1. What
FlashInfer has not compiled shows as –; `--wait` gives its compilers so many seconds first. Mostly Triton compiles, where its
cache is empty. `torch` is the plain backend, launched call by call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rates import here, write_rows
from shapes import add_shape, named, names, numbers, numbers_from_0

from fluentllm.assembly.attention import candidates
from fluentllm.assembly.attention.timing import Point, able, compare, points
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import PHASES, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.hub.config import architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fluentllm.assembly.attention.records import Times

MODELS = Path(__file__).resolve().parents[1] / "gpu" / "models"
DEVICE = torch.device("cuda")
LONGEST = 131072
"""Of what `--shape` describes."""


@dataclass(frozen=True)
class Heads:
    """As `--shape` has it: grouped heads (MLA's are `mla_decode.py`'s)."""

    heads: int
    kv_heads: int
    head_dim: int
    name: str = ""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} KV heads evenly")

    @property
    def label(self) -> str:
        return self.name or f"{self.heads}/{self.kv_heads}x{self.head_dim}"

    @property
    def model(self) -> ModelSpec:
        kv = KVSpec(kind="gqa", layers=1, heads=self.kv_heads, head_dim=self.head_dim, v_head_dim=self.head_dim)
        return ModelSpec(architecture="none", vocab_size=1, hidden_size=self.heads * self.head_dim, layers=1, heads=self.heads,
                         max_position=LONGEST, kv=kv)  # fmt: skip


def spec_of(name: str, plugins: PluginManager) -> ModelSpec:
    config = json.loads((MODELS / name / "config.json").read_text())
    spec: ModelSpec = plugins.registry("models").get(architecture(config)).factory.spec(config)
    return spec


def wanted_points(options: argparse.Namespace, phase: str, longest: int) -> list[Point]:
    """Those that were asked for; where nothing was, those that `attention.backend: auto` measures."""
    if phase == "decode" and (options.batch or options.ctx or options.q_len):
        asked = itertools.product(options.batch or [1, 32], options.q_len or [1], options.ctx or [1024, 16384])
        return [Point(batch, rows, keys, "decode") for batch, rows, keys in asked]
    if phase == "prefill" and (options.new or options.cached):
        asked_for = itertools.product(options.new or [512, 2048], options.cached or [0])
        return [Point(1, new, new + cached, "prefill") for new, cached in asked_for]
    return points("decode" if phase == "decode" else "prefill", longest)


def counted(model: ModelSpec, point: Point) -> tuple[int, int]:
    """Bytes and FLOPs of a layer's call in BF16. MLA: absorbed in decode, multiplied out to heads in prefill."""
    kv, heads = model.kv, model.heads
    rows = point.sequences * point.rows
    pairs = rows * (point.keys - point.rows) + point.sequences * point.rows * (point.rows + 1) // 2
    if kv.kind == "gqa":
        both = kv.head_dim + kv.v_head_dim
        return 2 * (point.tokens * kv.heads + rows * heads) * both, 2 * pairs * heads * both
    nope, value = kv.nope_dim or 128, kv.value_dim or 128  # as `timing.Bench` has it
    expansion = heads * kv.latent_dim * (nope + value)
    moved = point.tokens * (kv.latent_dim + kv.rope_dim) + rows * heads * (nope + kv.rope_dim + value) + expansion
    if point.phase == "decode":
        return 2 * moved, 2 * (pairs * heads * (2 * kv.latent_dim + kv.rope_dim) + rows * expansion)
    return 2 * moved, 2 * (pairs * heads * (nope + kv.rope_dim + value) + point.tokens * expansion)


def timed(wanted: Sequence[Point], times_of: Callable[[list[Point]], Times]) -> dict[Point, dict[str, float]]:
    """Points → backends → microseconds. Those of as many rows together: `compare` names points without their rows."""
    found: dict[Point, dict[str, float]] = {}
    for rows in dict.fromkeys(point.rows for point in wanted):
        alike = [point for point in wanted if point.rows == rows]
        times = times_of(alike)
        found |= {point: times.get(str(point), {}) for point in alike}
    return found


def shown(name: str, us: float | None, floor: float) -> str:
    return f"{name} –" if us is None else f"{name} {us:.1f} ({floor / us:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.parent.name for path in MODELS.glob("*/config.json"))
    parser.add_argument("--pages", type=numbers, default=[16, 32, 64])
    parser.add_argument("--models", type=names(every), help="qwen3-0.6b,llama-3.1-8b unless given, none with --shape")
    add_shape(parser, Heads, "grouped heads")
    parser.add_argument("--phases", type=names(PHASES), default=list(PHASES))
    parser.add_argument("--batch", type=numbers, help="sequences of a decode pass")
    parser.add_argument("--q-len", type=numbers, help="its rows a sequence")
    parser.add_argument("--ctx", type=numbers, help="its keys a sequence, the new ones included")
    parser.add_argument("--new", type=numbers, help="tokens of a prefill pass")
    parser.add_argument("--cached", type=numbers_from_0, help="tokens in front of them")
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if min(chosen.ctx or [1024]) < max(chosen.q_len or [1]):
        parser.error("--ctx counts the rows of --q-len too, so it cannot be less")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings, plugins = Settings(), PluginManager.load({"executor", "cli"}, strict=False)
    print(torch.cuda.get_device_name(DEVICE), "torch", torch.__version__, "CUDA", torch.version.cuda)
    rates = here()
    print(f"{'model':16}{'page':>5}  {'':8}{'point':16}  backend µs (share)")
    models = {name: spec_of(name, plugins) for name in named(chosen.models, chosen.shape, ["qwen3-0.6b", "llama-3.1-8b"])}
    models |= {heads.label: heads.model for heads in chosen.shape}
    rows = []
    for (name, model), page, phase in itertools.product(models.items(), chosen.pages, chosen.phases):
        spec = AttentionSpec(
            model=model, device="cuda", dtype="bfloat16", kv_dtype="bfloat16", page_size=page, deterministic=False
        )
        asked = replace(spec, phases=(phase,))
        entries = candidates(settings, spec, plugins, phase)
        wanted = wanted_points(chosen, phase, model.max_position)
        until = time.monotonic() + chosen.wait
        while len(able(settings, asked, entries, DEVICE, wanted[0])) < len(entries) and time.monotonic() < until:
            time.sleep(1)
        times_of = partial(compare, settings, asked, entries, DEVICE)
        for point, times in timed(wanted, times_of).items():
            moved, flops = counted(model, point)
            floor = rates.floor_us(moved, bf16=flops)
            each = {entry.name: times.get(entry.name) for entry in entries}
            shares = {backend: us and floor / us for backend, us in each.items()}
            rows.append({"model": name, "page_size": page, "phase": phase, "point": str(point), "batch": point.sequences,
                         "q_len": point.rows, "ctx": point.keys, "floor_us": floor, "share": shares, **each})  # fmt: skip
            line = "  ".join(shown(backend, us, floor) for backend, us in each.items())
            named_point = str(point) if phase == "prefill" or point.rows == 1 else f"{point}, q {point.rows}"
            print(f"{name:16}{page:5}  {phase:8}{named_point:16}  {line}", flush=True)
    write_rows(chosen.json, rows, rates)


if __name__ == "__main__":
    main()
