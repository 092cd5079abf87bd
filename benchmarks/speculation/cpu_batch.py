"""Whether drafts make a batch on this machine faster, or `auto` ever slower: continuations of Python sources, sampled at
temperature 0.8, each contender against no drafts.

    python benchmarks/speculation/cpu_batch.py --model longcat-nano --method mtp --batch 1,8 --json FILE

Every contender is a process with an engine of its own; they take turns, round by round, in every other round the other way
round. What counts is the ratio of the seconds of all rounds; `again none`, a second process without drafts, says how far two
that do the same are apart.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from fluentllm.bench import report
from fluentllm.core.config import load
from fluentllm.core.types import Request, SamplingParams
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import resolve
from fluentllm.local import LocalEngine

PROMPT = 100


def contenders(method: str) -> dict[str, dict[str, Any]]:
    fixed = {f"{method}, k {k}": {"speculative.method": method, "speculative.k": k, "speculative.max_k": k} for k in (1, 2, 3)}
    return {"none": {}, "again none": {}, **fixed, f"{method}, auto": {"speculative.method": method}}


def serve_rounds(options: argparse.Namespace) -> None:
    """A contender's process: a round's number a line; answers with its seconds."""
    settings = {"model.name": options.model, "kv.prefix_cache": False, "scheduler.max_running": options.batch[0]}
    source = (Path(sysconfig.get_path("stdlib")) / "html/parser.py").read_text(encoding="utf-8")
    text = load_tokenizer(resolve(options.model).path).encode(source)
    with LocalEngine(load(None, settings | contenders(options.method)[options.contender], {}).settings) as local:

        async def one(prompt: list[int], number: int) -> None:
            params = SamplingParams(max_tokens=options.new, temperature=0.8, seed=number, ignore_eos=True)
            async for _ in local.generation.client.submit(
                Request(id=f"{time.time_ns()}-{number}", prompt=prompt, params=params)
            ):
                pass

        async def together(number: int) -> float:
            rng = random.Random(number)
            starts = [rng.randrange(len(text) - PROMPT) for _ in range(options.batch[0])]
            started = time.perf_counter()
            await asyncio.gather(*(one(text[at : at + PROMPT], 100 * number + i) for i, at in enumerate(starts)))
            return time.perf_counter() - started

        print("ready", flush=True)
        for line in sys.stdin:
            print(local.call(together(int(line))), flush=True)


def compare(options: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    names = [name for name in contenders(options.method) if not options.only or name in ("none", *options.only)]
    command = [sys.executable, __file__, "--model", options.model, "--method", options.method, "--new", str(options.new)]
    running = {
        name: subprocess.Popen(
            [*command, "--batch", str(batch), "--contender", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    }

    def answer(name: str) -> str:
        out = running[name].stdout
        assert out is not None
        return out.readline().strip()

    for name in names:
        assert answer(name) == "ready", f"{name} did not start"
    seconds: dict[str, float] = dict.fromkeys(names, 0.0)
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            print(number, file=running[name].stdin, flush=True)
            seconds[name] += float(answer(name))
    for process in running.values():
        process.communicate()
    return [{"batch": batch, "contender": name, "s": s, "over_none": s / seconds["none"]} for name, s in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="longcat-nano")
    parser.add_argument("--method", default="mtp")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--new", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--only", nargs="*", help="contenders beside none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        serve_rounds(options)
        return
    rows = []
    for batch in options.batch:
        for row in compare(options, batch):
            print(f"batch {batch:>3}  {row['contender']:<12} {row['s']:7.2f} s  {row['over_none']:.3f} of none", flush=True)
            rows.append(row)
    if options.json:
        report.write(options.json, {"model": options.model, "method": options.method, "rows": rows})


if __name__ == "__main__":
    main()
