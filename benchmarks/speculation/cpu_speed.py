"""Whether drafts make a single stream faster on this machine: SmolLM2, greedy, each contender against no drafts.

    python benchmarks/speculation/cpu_speed.py --json FILE        # about three minutes, on a machine that does nothing else
    python benchmarks/speculation/cpu_speed.py --only again pld   # contenders whose names begin so

Every contender is a process with an engine of its own, and they take turns, task by task: none, pld, none, pld auto, … What
counts is the ratio of a contender's ms a token to that of `none` beside it, so load that comes and goes cancels. Tasks
whose answers repeat the prompt are `repeating_answers.py`'s, chats those that the EAGLE-3 head was not trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from repeating_answers import TASKS

from fluentllm.bench import report
from fluentllm.core.config import load
from fluentllm.core.types import Request, SamplingParams
from fluentllm.local import LocalEngine

HELD_OUT = Path(__file__).parents[2] / "examples" / "train_eagle" / "heldout.txt"
REPEATING = [TASKS[name] for name in ("edit a letter", "correct a report", "copy a report")]
CONTENDERS: dict[str, dict[str, Any]] = {
    "none": {},
    "again none": {},
    "pld, k 3": {"speculative.method": "pld", "speculative.k": 3, "speculative.max_k": 3},
    "pld, auto": {"speculative.method": "pld"},
    "eagle, k 1": {"speculative.method": "eagle", "speculative.k": 1, "speculative.max_k": 1},
    "eagle, k 2": {"speculative.method": "eagle", "speculative.k": 2, "speculative.max_k": 2},
    "eagle, k 3": {"speculative.method": "eagle", "speculative.k": 3, "speculative.max_k": 3},
    "eagle, auto": {"speculative.method": "eagle"},
    "eagle, k 3, SYNTHETIC 2.2": {
        "speculative.method": "eagle",
        "speculative.k": 3,
        "speculative.max_k": 3,
        "speculative.synthetic_acceptance": 2.2,
    },
    "eagle, auto, SYNTHETIC 1.0": {"speculative.method": "eagle", "speculative.synthetic_acceptance": 1.0},
}
"""`again none` is the control: how far two processes are apart that do the same. The last two accept drafts by a coin, and
their answers mean nothing: 2.2 tokens a step on average, the length aimed at, and no draft at all, so that one sees what the
draft layer costs while it brings nothing."""


def serve_tasks(contender: str, new: int) -> None:
    """A contender's process: a task a line, as JSON; answers with what it took."""
    settings = load(None, {"model.name": "smollm2", "model.max_model_len": 1024, **CONTENDERS[contender]}, {}).settings
    with LocalEngine(settings) as local:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(local.call(_answer(local, json.loads(line), new))), flush=True)


async def _answer(local: LocalEngine, text: str, new: int) -> dict[str, Any]:
    prompt = await local.generation.encode_chat([{"role": "user", "content": text}])
    request = Request(
        id=f"bench-{time.time_ns()}", prompt=prompt, params=SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    )
    tokens, started = 0, 0.0
    counts = {"steps": 0, "drafted": 0, "accepted": 0}
    async for output in local.generation.client.submit(request):
        if not tokens:
            started = time.perf_counter()
        tokens += len(output.tokens)
        counts["steps"] += 1
        counts["drafted"] += output.drafted
        counts["accepted"] += output.accepted
    # The first token is the prompt's.
    return {"ms": 1e3 * (time.perf_counter() - started) / (tokens - 1), **counts}


class Contender:
    def __init__(self, name: str, new: int) -> None:
        command = [sys.executable, __file__, "--contender", name, "--new", str(new)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready", f"{name} did not start"

    def run(self, task: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def compare(tasks: list[str], names: list[str], running: dict[str, Contender], rounds: int) -> dict[str, dict[str, float]]:
    """`none` and each contender in turn, task by task, in every other round the other way round → medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for task in tasks:
            for name in names:
                pair = ("none", name) if number % 2 == 0 else (name, "none")
                answers = {each: running[each].run(task) for each in pair}
                plain, drafted = answers["none"], answers[name]
                row = {"ms": drafted["ms"], "none_ms": plain["ms"], "ratio": plain["ms"] / drafted["ms"]}
                row |= {
                    "drafts_a_step": drafted["drafted"] / drafted["steps"],
                    "tokens_a_step": plain["steps"] / drafted["steps"],
                }
                found[name].append(row)
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new", type=int, default=64, help="new tokens of an answer")
    parser.add_argument("--only", nargs="*", default=[""], help="contenders whose names begin so")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        serve_tasks(args.contender, args.new)
        return
    chats = [text for text in HELD_OUT.read_text(encoding="utf-8").splitlines() if text.strip()][:3]
    names = [name for name in CONTENDERS if name != "none" and name.startswith(tuple(args.only))]
    running = {name: Contender(name, args.new) for name in ("none", *names)}
    rows: dict[str, Any] = {}
    try:
        for kind, tasks in (("answers that repeat the prompt", REPEATING), ("chats", chats)):
            for contender in running.values():
                contender.run(tasks[0])  # `auto` measures its programs
            rows[kind] = compare(tasks, names, running, args.rounds)
            for name, row in rows[kind].items():
                print(
                    f"{kind:32} {name:16} {row['ms']:6.1f} ms a token, none {row['none_ms']:6.1f}: {row['ratio']:.2f} x; "
                    f"{row['drafts_a_step']:.2f} drafts, {row['tokens_a_step']:.2f} tokens a step",
                    flush=True,
                )
    finally:
        for contender in running.values():
            contender.close()
    report.write(args.json, {"rounds": args.rounds, "new": args.new, "rows": rows, **report.environment()})


if __name__ == "__main__":
    main()
