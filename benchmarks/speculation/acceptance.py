"""Mean accepted length of each proposer on text that nobody trained on, greedy: MTP on longcat-nano and its n-gram variant,
EAGLE-3 on SmolLM2 in chats, prompt lookup on SmolLM2 where the answer repeats the prompt.

    python benchmarks/speculation/acceptance.py --k 3 --json FILE

MTP continues standard library sources that were held out (`examples/train_nano/data.py`), EAGLE-3 answers the prompts of
`examples/train_eagle/heldout.txt`, prompt lookup does the tasks of `repeating_answers.py`. A length is tokens a verification,
the target's own included: 1 is no draft accepted, k + 1 is all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repeating_answers import TASKS

from fluentllm.bench import report
from fluentllm.core.config import load
from fluentllm.core.types import Request, SamplingParams
from fluentllm.local import LocalEngine

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
Chat = list[dict[str, str]]
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    method: str
    prompts: Callable[[int], list[str | Chat]]
    """Texts to continue, or chats to answer; at most so many."""
    prompt_tokens: int | None = None
    """Cut the prompts here."""


def held_out_sources(count: int) -> list[str | Chat]:
    """The middle of each file, from a line's start."""
    from examples.train_nano.data import sources

    found: list[str | Chat] = []
    for text in sources()[1]:
        if len(text) > 2000:
            found.append(text[text.index("\n", len(text) // 2 - 500) + 1 :][:2000])
    return found[:count]


def held_out_chats(count: int) -> list[str | Chat]:
    lines = (ROOT / "examples" / "train_eagle" / "heldout.txt").read_text().splitlines()
    return [chat(line) for line in lines[:count]]


def repeating(count: int) -> list[str | Chat]:
    return [chat(text) for text in list(TASKS.values())[:count]]


def chat(text: str) -> Chat:
    return [{"role": "user", "content": text}]


CASES = {
    "MTP, longcat-nano": Case("longcat-nano", "mtp", held_out_sources, 96),
    "MTP, longcat-nano-ngram": Case("longcat-nano-ngram", "mtp", held_out_sources, 96),
    "EAGLE-3, smollm2": Case("smollm2", "eagle", held_out_chats),
    "PLD, smollm2": Case("smollm2", "pld", repeating),
}


def measure(case: Case, k: int, count: int, new: int) -> dict[str, Any]:
    """Totals of all prompts."""
    overrides = {"model.name": case.model, "speculative.method": case.method}
    overrides |= {"speculative.k": k, "speculative.max_k": k}  # type: ignore[dict-item]
    overrides |= {"model.weight_precision": "float32"}
    with LocalEngine(load(None, overrides, {}).settings) as local:
        rows = local.call(_answers(local, case, case.prompts(count), new))
    total = {key: sum(row[key] for row in rows) for key in ("tokens", "verifications", "drafted", "accepted")}
    return {"prompts": len(rows), **total, "mean_accepted_length": 1 + total["accepted"] / max(1, total["verifications"])}


async def _answers(local: LocalEngine, case: Case, prompts: list[str | Chat], new: int) -> list[dict[str, int]]:
    """All at once: what is accepted does not depend on what else runs."""
    return list(await asyncio.gather(*(_answer(local, case, prompt, new) for prompt in prompts)))


async def _answer(local: LocalEngine, case: Case, prompt: str | Chat, new: int) -> dict[str, int]:
    generation = local.generation
    tokens = await (generation.encode(prompt) if isinstance(prompt, str) else generation.encode_chat(prompt))
    params = SamplingParams(max_tokens=new, temperature=0.0)
    counts = {"tokens": 0, "verifications": 0, "drafted": 0, "accepted": 0}
    request = Request(id=f"bench-{next(_numbers)}", prompt=tokens[: case.prompt_tokens], params=params)
    async for output in generation.client.submit(request):
        counts["tokens"] += len(output.tokens)
        counts["verifications"] += output.drafted > 0
        counts["drafted"] += output.drafted
        counts["accepted"] += output.accepted
    return counts


def chosen(only: str | None) -> Iterator[tuple[str, Case]]:
    for name, case in CASES.items():
        if only is None or case.method in only.split(","):
            yield name, case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=3, help="drafts a step")
    parser.add_argument("--prompts", type=int, default=24, help="most prompts of each")
    parser.add_argument("--new", type=int, default=96, help="most new tokens of an answer")
    parser.add_argument("--only", help="methods, such as mtp,eagle")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for name, case in chosen(args.only):
        row = rows[name] = measure(case, args.k, args.prompts, args.new)
        print(
            f"{name:24} {row['prompts']:3} prompts {row['tokens']:5} tokens  drafted {row['drafted']} "
            f"accepted {row['accepted']}  mean accepted length {row['mean_accepted_length']:.2f}",
            flush=True,
        )
    report.write(args.json, {"k": args.k, "new": args.new, "rows": rows, **report.environment()})


if __name__ == "__main__":
    main()
