"""Time to the first token that a decode engine makes: layers pushed while later ones compute, against sending after prefill.

    python benchmarks/disaggregation/overlap.py [--prompt 2048] [--repeat 9] [--json FILE]

Two prefill engines with the same weights, one with `overlap` off, and one decode engine, all processes of their own over
NIXL. The requests take turns, so that other work on the machine meets both alike. With a fast transport overlap may take 2 %
more, also for a short prompt; with one slowed to where sending takes as long as computing, at most 0.6 of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from cluster import HEADERS, LLAMA, Cluster, Engine, both, bytes_per_token, machine

LETTERS = {str(token): 100 for token in range(100, 120)}
"""Tokens whose bytes are whole characters, so that each gives an event."""
FIXED = {"kv.prefix_cache": False, "scheduler.prefill_tokens": 4096}


def second_token(prefill: Engine, decode: Engine, tokens: list[int], pool: ThreadPoolExecutor) -> float:
    """Seconds to the second token: the first is prefill's, and comes along."""
    body = both(prefill, {"prompt": tokens, "max_tokens": 3, "temperature": 0, "logit_bias": LETTERS})
    started = time.perf_counter()
    other = pool.submit(httpx.post, f"{prefill.url}/v1/completions", json=body, headers=HEADERS, timeout=120)
    seen = 0
    elapsed, last = 0.0, ""
    url = f"{decode.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, headers=HEADERS, timeout=120) as events:
        for line in events.iter_lines():
            seen += line.startswith("data: {")
            if seen == 2 and not elapsed:
                elapsed = time.perf_counter() - started
            last = line or last
    other.result().raise_for_status()
    if not elapsed:
        raise RuntimeError(f"the answer had fewer than two events; the last line was {last!r}")
    return elapsed


def compare(length: int, repeat: int, bandwidth: float) -> dict[str, Any]:
    faults = {"plugins.kv_layerwise.faults": {"bytes_per_second": bandwidth}} if bandwidth else {}
    with Cluster() as cluster, ThreadPoolExecutor(4) as pool:
        ways = {
            "overlap": cluster.start("prefill", **FIXED, **faults),
            "after": cluster.start("prefill", **FIXED, **faults, **{"plugins.kv_layerwise.overlap": False}),
        }
        decode = cluster.start("decode", **FIXED, peers=[engine.control for engine in ways.values()])
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeat + 2):
            tokens = [3 + (turn * 31 + 7 * i) % 500 for i in range(length)]
            order = list(ways.items())
            for name, engine in order if turn % 2 else reversed(order):
                seconds = second_token(engine, decode, tokens, pool)
                if turn >= 2:  # the first two warm up
                    times[name].append(seconds)
        stats = decode.state()["stats"]["handoff"]
        if stats.get("local_prefills"):
            raise RuntimeError(f"prompts were computed by the decode engine: {stats}")
    pairs = [a / b for a, b in zip(times["overlap"], times["after"], strict=True)]
    return {
        "prompt": length,
        "bytes_per_second": bandwidth,
        "seconds": times,
        "median": {name: statistics.median(values) for name, values in times.items()},
        "best": {name: min(values) for name, values in times.items()},
        "ratio_of_medians": statistics.median(times["overlap"]) / statistics.median(times["after"]),
        "ratio_of_best": min(times["overlap"]) / min(times["after"]),
        "median_of_ratios": statistics.median(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--short", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    fast = [compare(length, options.repeat, 0) for length in (options.prompt, options.short)]
    # Sending after prefill over the fast transport is all but computing.
    bandwidth = options.prompt * bytes_per_token(LLAMA) / fast[0]["median"]["after"]
    slow = compare(options.prompt, options.repeat, bandwidth)
    for name, found, limit in (("slow", slow, 0.6), ("fast", fast[0], 1.02), ("fast, short", fast[1], 1.02)):
        print(
            f"{name:12} {found['prompt']:5} tokens: overlap {found['median']['overlap'] * 1e3:7.1f} ms, after "
            f"{found['median']['after'] * 1e3:7.1f} ms; ratio {found['ratio_of_medians']:.3f} of medians, "
            f"{found['ratio_of_best']:.3f} of the best, {found['median_of_ratios']:.3f} in pairs (limit {limit})"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "slow": slow, "fast": fast}, indent=1))


if __name__ == "__main__":
    main()
