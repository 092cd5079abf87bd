"""Steps with prompt tokens beside decodes, one by one: what they held, what they took, what launching took the host, and what
the prefill budget believed (`core/prefill_budget.py`).

    python benchmarks/gpu/prefill_steps.py --model benchmarks/gpu/models/qwen3-0.6b --batch 32 --json FILE

`--batch` prompts of `--ctx` tokens at once, as `fluent bench latency` sends them, `--rounds` times. A row a step with prompt
tokens: {round, tokens, prompts, decoding, ms, own_ms (of a step without prompt tokens, as known before), launching_ms,
behind_ms (that the device still worked when all was launched), floor_ms}.
"""

from __future__ import annotations

import json
from typing import Any

import engines

from fluentllm.bench.offline import latency
from fluentllm.core.prefill_budget import PrefillBudget


def main() -> None:
    parser = engines.parser(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    rounds = 0
    collected = PrefillBudget.collected

    def noted(self: PrefillBudget, plan: Any, result: Any) -> None:
        if plan.prefill:
            own = self._decode.get(1 << max(0, len(plan.decode) - 1).bit_length(), 0.0) if plan.decode else 0.0
            rows.append({
                "round": rounds,
                "tokens": sum(chunk.count for chunk in plan.prefill),
                "prompts": len(plan.prefill),
                "decoding": len(plan.decode),
                "ms": result.seconds * 1e3,
                "own_ms": own * 1e3,
                "launching_ms": result.launching * 1e3,
                "behind_ms": result.behind * 1e3,
                "floor_ms": self.floor(0) * 1e3,
            })  # fmt: skip
        collected(self, plan, result)

    PrefillBudget.collected = noted  # type: ignore[method-assign]
    with engines.engine(args, {}) as local:
        for rounds in range(args.rounds):
            figures = latency(local, [args.batch], args.ctx, 64, 1, tell=lambda _: None)[0]
            print(f"round {rounds}: TPOT {figures['tpot_ms']:.2f} ms, prefill {figures['prefill_s']:.3f} s")
            print(f"{'tokens':>7} {'prompts':>7} {'decoding':>8} {'ms':>8} {'own':>7} {'launch':>7} {'behind':>7} {'floor':>7}")
            for row in [row for row in rows if row["round"] == rounds]:
                print(
                    f"{row['tokens']:7} {row['prompts']:7} {row['decoding']:8} {row['ms']:8.2f} {row['own_ms']:7.2f} "
                    f"{row['launching_ms']:7.2f} {row['behind_ms']:7.2f} {row['floor_ms']:7.2f}"
                )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
