"""Bytes that a chat moves between prefill and decode, with decode's radix cache and without.

    python benchmarks/disaggregation/radix.py [--turns 10] [--json FILE]

Each turn's prompt is all that was said before, answers too, and a new question. The bytes are those of `usage.kv_transfer`;
they do not depend on what else the machine does. With the cache at most a quarter may move.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from cluster import HEADERS, SMALL, Cluster, Engine, both, bytes_per_token, machine

SYSTEM, QUESTION, ANSWER = 400, 40, 60
"""Tokens, a letter each."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def chat(prefill: Engine, decode: Engine, turns: int) -> list[dict[str, int]]:
    told = httpx.post(f"{decode.url}/tokenize", json={"prompt": LETTERS}, headers=HEADERS, timeout=30).json()["tokens"]
    # A random model's text would not come back as the same tokens: it is held to letters.
    options = {"max_tokens": ANSWER, "temperature": 0.8, "seed": 1, "logit_bias": {str(token): 100 for token in told[-26:]}}
    history = "".join(LETTERS[7 * i % 26] for i in range(SYSTEM))
    found = []
    with ThreadPoolExecutor(1) as pool:
        for turn in range(turns):
            history += "".join(LETTERS[(11 * i + 13 * turn) % 26] for i in range(QUESTION))
            body = both(prefill, {"prompt": history, **options})
            other = pool.submit(httpx.post, f"{prefill.url}/v1/completions", json=body, headers=HEADERS, timeout=120)
            answer = httpx.post(f"{decode.url}/v1/completions", json=body, headers=HEADERS, timeout=120)
            answer.raise_for_status()
            other.result().raise_for_status()
            usage = answer.json()["usage"]
            expected = usage["prompt_tokens"] * bytes_per_token(SMALL)
            moved, saved = usage["kv_transfer"]["received_bytes"], usage["kv_transfer"]["saved_bytes"]
            if moved + saved != expected:
                raise RuntimeError(f"turn {turn}: {moved} bytes moved and {saved} saved, of {expected}")
            found.append({"prompt": usage["prompt_tokens"], "moved": moved, "saved": saved})
            history += answer.json()["choices"][0]["text"]
            print(f"  turn {turn + 1}: {moved:,} bytes moved, {saved:,} saved", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with Cluster() as cluster:
        prefill = cluster.start("prefill", model=SMALL)
        results = {}
        for name, cached in (("on", True), ("off", False)):
            decode = cluster.start("decode", model=SMALL, peers=[prefill.control], **{"kv.prefix_cache": cached})
            results[name] = chat(prefill, decode, options.turns)
    moved = {name: sum(turn["moved"] for turn in turns) for name, turns in results.items()}
    share = moved["on"] / moved["off"]
    print(f"{options.turns} turns: {moved['on']:,} bytes with the cache, {moved['off']:,} without: {share:.1%} (limit 25 %)")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "share": share, "turns": results}, indent=1))
    sys.exit(share > 0.25)


if __name__ == "__main__":
    main()
