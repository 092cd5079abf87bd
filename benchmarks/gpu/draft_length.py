"""`speculative.k: auto` beside no speculation and every fixed K, in one run: does it cost anything where drafts are wrong, does
it find the best where they are right?

    python benchmarks/gpu/draft_length.py --model benchmarks/gpu/models/deepseek-v3-lite --acceptance 1.0,2.0,3.0 --json FILE

One engine without speculation, then one for each mean accepted length (SYNTHETIC: drafts are accepted at random), in which
`auto` runs first, by batch, and then each K. Milliseconds a token and sequence, by (time of steps + 1 tokens − time of 1) /
steps. `auto` is given by round: the first rounds of a batch find out what is best. `latency` has programs captured before.
Rows: {synthetic_acceptance, batch, none, fixed: {K: ms}, auto: [ms by round], over_none, over_best}; the last two by the last
round.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import engines

from fluentllm.bench.offline import latency

if TYPE_CHECKING:
    from fluentllm.local import LocalEngine


def rounds_of(local: LocalEngine, batch: int, args: argparse.Namespace, rounds: int) -> list[float]:
    """Milliseconds a token of a sequence in each round."""
    row = latency(local, [batch], args.ctx, args.steps, rounds, tell=lambda _: None)[0]
    return [round(ms, 3) for ms in row["rounds_ms"]]


def engine(args: argparse.Namespace, **speculative: Any) -> LocalEngine:
    given: dict[str, Any] = {
        "scheduler.max_running": max(args.batch),
        # The prompts of a round come at once: protecting some from the others would be timed too.
        "scheduler.max_step_ratio": 1000,
    }
    return engines.engine(args, given | {f"speculative.{name}": value for name, value in speculative.items()})


def compared(acceptance: float, batch: int, none: float, fixed: dict[int, float], auto: list[float]) -> dict[str, Any]:
    best = min(none, *fixed.values())
    ratios = {"over_none": round(auto[-1] / none, 3), "over_best": round(auto[-1] / best, 3)}
    return {"synthetic_acceptance": acceptance, "batch": batch, "none": none, "fixed": fixed, "auto": auto} | ratios


def main() -> None:
    parser = engines.parser(__doc__)
    parser.add_argument("--method", default="mtp")
    parser.add_argument("--max-k", type=int, default=3)
    parser.add_argument("--acceptance", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 2.0, 3.0])
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="of auto; the others run one, after one that warms up")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with engine(args) as local:
        none = {batch: rounds_of(local, batch, args, 1)[0] for batch in args.batch}
    print(f"no speculation: {none}", flush=True)
    for acceptance in args.acceptance:
        wanted = {"method": args.method, "k": "auto", "max_k": args.max_k, "synthetic_acceptance": acceptance}
        with engine(args, **wanted) as local:
            controller = local.engine.draft_length
            assert controller is not None
            auto = {batch: rounds_of(local, batch, args, args.rounds) for batch in args.batch}
            print(f"SYNTHETIC {acceptance} tokens a step, auto: {auto}", flush=True)
            for batch in args.batch:
                fixed = {}
                for k in range(1, args.max_k + 1):
                    controller.fixed = k
                    fixed[k] = rounds_of(local, batch, args, 1)[0]
                rows.append(compared(acceptance, batch, none[batch], fixed, auto[batch]))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
