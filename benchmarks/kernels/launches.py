"""Whole steps under different ways of launching: where kernels let the next one start, who merges attention's runs, which tiles
products of few rows take, whether MLA's steps share launches. Run it before changing a default.

    python benchmarks/kernels/launches.py --model benchmarks/gpu/models/qwen3-0.6b --batches 1,32 --kv-memory 8GiB --json FILE

One engine with random weights; before each variant its graphs are given up, so that they are captured again with the variant's
choices. Printed is the median of the device's time for a step in which all sequences decode; TPOT as `fluent bench latency`
takes it, which has the prompts' chunks between steps in it, goes to the file. The first variant is measured again at the end:
the difference between the two is the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fluentllm.bench.offline import latency
from fluentllm.core.config import load
from fluentllm.kernels.mla_decode import expand, switches
from fluentllm.kernels.triton import (
    deferred_norm,
    gqa_decode,
    gqa_plan,
    held,
    hopper_tiles,
    linear,
    linear_tiles,
    mla_absorb,
)
from fluentllm.kernels.triton.launch import EARLY, START_NEXT
from fluentllm.local import LocalEngine
from fluentllm.plugins.attn_triton import backend as triton_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fluentllm.core.types import StepPlan, StepResult


SWITCHES = ("PAGES_IN_RECORD", "LAUNCH_EARLY", "SWAP_OPERANDS", "VALUES_IN_REGISTERS", "FETCH_MAPS")
"""Of MLA's decode."""


@dataclass(frozen=True)
class Variant:
    name: str
    product: int = 1
    """Of `launch.START_NEXT`: 0 no programmatic launch, 1 first, 2 loaded, 3 at the end."""
    small: int = 1
    early: bool = True
    """May products be set up early?"""
    experts_early: bool = EARLY["experts"]
    """May experts' products?"""
    few_experts_early: bool = EARLY["few experts"]
    hold_keys: bool = gqa_decode.HOLD
    merge_inside: bool = False
    prefetch: int = 0
    measured: bool = True
    """Tiles from `linear_tiles.MEASURED`, else the rule's."""
    most_tokens: int = linear_tiles.MOST_TOKENS
    """0: all products are torch's."""
    most_appended: int = triton_attention.MOST_APPENDED
    """Up to so many tokens grouped heads are rotated and appended by decode itself, else by a launch in front."""
    clusters: bool = True
    """May programs of a cluster share tiles? Else the streaming kernel has these products."""
    held_tokens: int = held.MOST_TOKENS
    """Up to so many tokens weights are held in registers; 0: never."""
    held_bytes: int = held.HELD_BYTES
    defer_norms: bool = True
    """Norms shared out between the products around them, else launches of their own."""
    mla_tokens: int = mla_absorb.MOST_TOKENS
    """Up to so many MLA's products are parts of its other launches; 0: never."""
    mla_merge_inside: bool | None = None
    """Are MLA's splits merged where its values are expanded? None: by counting."""
    mla_switches: tuple[str, ...] | None = None
    """Of `mla_decode.switches`, those that are on; None: as they are."""


VARIANTS = [
    Variant("base"),
    Variant("product loaded", product=2),
    Variant("product at end", product=3),
    Variant("no clusters", clusters=False),
    Variant("no clusters, product late", clusters=False, early=False),
    Variant("not held", held_tokens=0),
    Variant("held 64 bytes", held_bytes=64),
    Variant("held 256 bytes", held_bytes=256),
    Variant("keys not held", hold_keys=False),
    Variant("few experts late", few_experts_early=False),
    Variant("norms apart", defer_norms=False),
    Variant("append apart", most_appended=0),
    Variant("append inside", most_appended=1 << 20),
    Variant("norms and append apart", defer_norms=False, most_appended=0),
    Variant("experts early", experts_early=True),
    Variant("product late", early=False),
    Variant("product late, loaded", product=2, early=False),
    Variant("small loaded", small=2),
    Variant("small at end", small=3),
    Variant("all loaded", product=2, small=2),
    Variant("all at end", product=3, small=3),
    Variant("not programmatic", product=0, small=0),
    Variant("merge inside", merge_inside=True),
    Variant("merge inside, product loaded", merge_inside=True, product=2),
    Variant("prefetch 8, product loaded", prefetch=8, product=2),
    Variant("tiles by rule", measured=False),
    Variant("products to 64", most_tokens=64),
    Variant("products to 128", most_tokens=128),
    Variant("torch's products", most_tokens=0),
    Variant("torch's products, all loaded", most_tokens=0, product=2, small=2),
    Variant("torch's products, merge inside", most_tokens=0, merge_inside=True),
    Variant("mla apart", mla_tokens=0),
    Variant("mla merged inside", mla_merge_inside=True),
    Variant("mla merged before", mla_merge_inside=False),
    Variant("mla off", mla_switches=()),
    Variant("mla pages", mla_switches=("PAGES_IN_RECORD",)),
    Variant("mla together", mla_switches=("MERGE_TOGETHER",)),
    Variant("mla early", mla_switches=("LAUNCH_EARLY",)),
    Variant("mla swapped", mla_switches=("SWAP_OPERANDS", "VALUES_IN_REGISTERS")),
    Variant("mla all apart", mla_switches=SWITCHES),
    Variant("mla all", mla_switches=(*SWITCHES, "MERGE_TOGETHER")),
    Variant("base again"),
]


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """The room's choices are the variant's inside."""

    def put(owner: Any, name: str, value: Any) -> None:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    with ExitStack() as undo:
        undo.callback(START_NEXT.update, dict(START_NEXT))
        undo.callback(EARLY.update, dict(EARLY))
        EARLY.update(product=variant.early, experts=variant.experts_early)
        EARLY["few experts"] = variant.few_experts_early
        put(gqa_decode, "HOLD", variant.hold_keys)
        START_NEXT.update(product=variant.product, small=variant.small, experts=variant.product)
        START_NEXT["few experts"] = variant.product
        put(gqa_plan, "MERGE_INSIDE", variant.merge_inside)
        put(linear_tiles, "MOST_TOKENS", variant.most_tokens)
        put(held, "MOST_TOKENS", variant.held_tokens)
        put(held, "HELD_BYTES", variant.held_bytes)
        put(deferred_norm, "DEFER", variant.defer_norms)
        put(triton_attention, "MOST_APPENDED", variant.most_appended)
        put(mla_absorb, "MOST_TOKENS", variant.mla_tokens)
        put(expand, "MERGE_INSIDE", variant.mla_merge_inside)
        if variant.mla_switches is not None:
            for name in (*SWITCHES, "MERGE_TOGETHER"):
                put(switches, name, name in variant.mla_switches)
        if not variant.clusters:
            put(hopper_tiles, "compiler_version", lambda: None)
            hopper_tiles.hopper_tile.cache_clear()
            undo.callback(hopper_tiles.hopper_tile.cache_clear)
        if not variant.measured:
            put(linear_tiles, "MEASURED", {})
        if variant.prefetch:
            choose = linear.linear_tile

            def ahead(*shape: Any) -> linear_tiles.Tile:
                tile = choose(*shape)
                return replace(tile, prefetch=variant.prefetch) if isinstance(tile, linear_tiles.LinearTile) else tile

            put(linear, "linear_tile", ahead)
        yield


def measure(local: LocalEngine, args: argparse.Namespace, variant: Variant) -> list[dict[str, Any]]:
    executor = local.engine.executor
    graphs = executor.programs._graphs
    with applied(variant):
        if graphs is not None:
            executor.call(graphs.clear).result()
        with decode_steps(local) as steps:
            rows = latency(local, args.batches, args.context, args.steps, args.rounds, tell=lambda _: None)
    return [row | {"step_ms": median(steps[row["batch"]]) * 1e3} for row in rows]


@contextmanager
def decode_steps(local: LocalEngine) -> Iterator[dict[int, list[float]]]:
    """Sequences → seconds of each step in which so many decode and no prompt is read."""
    found: dict[int, list[float]] = defaultdict(list)
    budget = local.engine.prefill_budget
    assert budget is not None
    collected = budget.collected

    def noted(plan: StepPlan, result: StepResult) -> None:
        if not plan.prefill:
            found[len(plan.decode)].append(result.seconds)
        collected(plan, result)

    budget.collected = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del budget.collected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kv-memory")
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = args.only.split(";") if args.only else [variant.name for variant in VARIANTS]
    unknown = set(wanted) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f"there is no variant {sorted(unknown)}: {[variant.name for variant in VARIANTS]}")
    print(f"{'step, ms':30}" + "".join(f"{f'B{batch}':>10}" for batch in args.batches))
    given = {"model.name": args.model, "model.load_format": args.load_format, "kv.memory": args.kv_memory}
    found = []
    with LocalEngine(load(None, {name: value for name, value in given.items() if value}, {}).settings) as local:
        for variant in VARIANTS:
            if variant.name in wanted:
                rows = measure(local, args, variant)
                found.append({"variant": variant.name, "rows": rows})
                print(f"{variant.name:30}" + "".join(f"{row['step_ms']:>10.3f}" for row in rows), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
