"""What an FP8 cache gives at long contexts: tokens/s of the same batch over a 16-bit and an FP8 cache, and of as many requests
as a given memory for KV holds.

    python benchmarks/gpu/long_context.py --model benchmarks/gpu/models/deepseek-v3-lite --ctx 16384 --batch 64 --kv-memory 38GB

Random prompts enter first (`scheduler.prefill_first`), then all decode together; a step's time is the median between tokens of
the sequence that came last. Rows: {kv, batch, ctx, step_ms, tok_s}; then the ratios of FP8 to 16 bits. 38 GB is about what an
80 GB card has left beside DeepSeek-V3-Lite's BF16 weights (31 GB), what the largest passes need, and a tenth kept free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import engines

from fluentllm.core.types import Request, SamplingParams

if TYPE_CHECKING:
    from fluentllm.local import LocalEngine

EARLY = 64
"""Tokens that the first sequences may have before the last one's prompt is through."""


async def step_seconds(local: LocalEngine, batch: int, ctx: int, steps: int) -> float:
    """Median time between two tokens of the sequence that was the last to begin, `steps` of them."""
    rng, vocabulary = random.Random(time.time_ns()), local.engine.info.spec.vocab_size
    times: dict[int, list[float]] = {}

    async def one(number: int) -> None:
        params = SamplingParams(max_tokens=steps + EARLY, temperature=0.0, ignore_eos=True)
        request = Request(id=f"{batch}-{number}", prompt=rng.choices(range(vocabulary), k=ctx), params=params)
        times[number] = [time.perf_counter() async for output in local.generation.client.submit(request) if output.tokens]

    await asyncio.gather(*(one(number) for number in range(batch)))
    last = max(times.values(), key=lambda own: own[0])[: steps + 1]
    if min(own[-1] for own in times.values()) < last[-1]:
        raise SystemExit(f"The first sequences had their {steps + EARLY} tokens before the last had {steps}: raise EARLY.")
    return statistics.median(after - before for before, after in pairwise(last))


def rows_of(args: argparse.Namespace, kv: str) -> list[dict[str, Any]]:
    settings = {"kv.dtype": kv, "scheduler.max_running": 256, "scheduler.prefill_first": True}
    with engines.engine(args, settings) as local:
        info = local.engine.info
        pages = -(-(args.ctx + args.steps + EARLY + 1) // info.page_size)
        most = min(256, info.kv_tokens // info.page_size // pages)
        rows = []
        for batch in (args.batch, most):
            if batch > most:
                raise SystemExit(f"{args.kv_memory} hold {most} of these sequences, {batch} were asked for: raise --kv-memory")
            seconds = local.call(step_seconds(local, batch, args.ctx, args.steps))
            row = {"kv": kv, "batch": batch, "ctx": args.ctx, "step_ms": seconds * 1e3, "tok_s": batch / seconds}
            rows.append(row)
            print("  ".join(f"{name} {round(v, 2) if isinstance(v, float) else v}" for name, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = engines.parser(__doc__)
    parser.set_defaults(kv_memory="38GB")
    parser.add_argument("--ctx", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    wide, narrow = rows_of(args, "auto"), rows_of(args, "fp8")
    for name, before, after in zip(("the same batch", "as many as fit"), wide, narrow, strict=True):
        print(f"{name}: {after['tok_s'] / before['tok_s']:.3f} x")
    if args.json is not None:
        args.json.write_text(json.dumps(wide + narrow, indent=1))


if __name__ == "__main__":
    main()
