"""How much of an answer prompt lookup guesses where the answer repeats the prompt: edits and summaries of given texts, greedy.

    python benchmarks/speculation/repeating_answers.py --model smollm2 --k 3 --json FILE

Prints, for each task, tokens a verification (the target's own included) and tokens a step of any kind, and the time a token
takes with and without drafts. Both runs must give the same text, but for ties that rounding breaks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fluentllm.bench import report
from fluentllm.core.config import load
from fluentllm.core.types import Request, SamplingParams
from fluentllm.local import LocalEngine

LETTER = """Dear Ms Okafor,
thank you for your order of 14 March. The two oak shelves left our workshop in Leeds this morning and will reach you on
Thursday between nine and noon. The driver will call you half an hour before he arrives. Please check both parcels for damage
while he is still there, and write on his sheet what you find. The invoice is in the smaller parcel; it is due within thirty
days. If anything is missing, call us at the number on the invoice and we will send it the same day.
Yours sincerely, Tom Hale"""
REPORT = """The river gauge at Stone Bridge stood at 3.2 metres on Monday evening and rose to 4.1 metres by Tuesday noon. The
council closed the lower car park at six in the morning and the towpath at eight. About forty houses in Mill Lane lost power
for two hours. Nobody was hurt. The water has been falling since Wednesday, and the towpath is to open again on Saturday if no
more rain comes. The council asks people to keep their dogs on a lead near the water."""
CODE = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)


def variance(values):
    centre = mean(values)
    total = 0
    for value in values:
        total = total + (value - centre) ** 2
    return total / len(values)"""
TASKS = {
    "edit a letter": f"Replace Thursday by Friday in this letter. Answer with the whole letter and nothing else.\n\n{LETTER}",
    "correct a report": f"Rewrite this report with 'town' instead of 'council'. Keep everything else.\n\n{REPORT}",
    "rename in code": f"Rename the variable total to amount in this program. Print the whole program.\n\n{CODE}",
    "copy a report": f"Repeat this text word for word.\n\n{REPORT}",
    "summarise a letter": f"Summarise this letter in two sentences.\n\n{LETTER}",
    "summarise a report": f"Summarise this report in two sentences.\n\n{REPORT}",
}


def measure(model: str, overrides: dict[str, Any], new: int) -> dict[str, dict[str, Any]]:
    """For each task its answer's tokens, what was drafted and accepted, and seconds from the first token to the last."""
    found = {}
    with LocalEngine(load(None, {"model.name": model, **overrides}, {}).settings) as local:
        local.call(_answer(local, "Say hello.", new))
        for name, text in TASKS.items():
            found[name] = local.call(_answer(local, text, new))
    return found


async def _answer(local: LocalEngine, text: str, new: int) -> dict[str, Any]:
    tokens = await local.generation.encode_chat([{"role": "user", "content": text}])
    params = SamplingParams(max_tokens=new, temperature=0.0)
    answer: list[int] = []
    counts = {"steps": 0, "verifications": 0, "drafted": 0, "accepted": 0}
    started = 0.0
    async for output in local.generation.client.submit(Request(id=f"bench-{time.time_ns()}", prompt=tokens, params=params)):
        if not answer:
            started = time.perf_counter()
        else:
            counts["steps"] += 1
            counts["verifications"] += output.drafted > 0
            counts["drafted"] += output.drafted
            counts["accepted"] += output.accepted
        answer += output.tokens
    seconds = time.perf_counter() - started
    text = await local.generation.decode(answer)
    return {"tokens": answer, "prompt_tokens": len(tokens), "text": text, "seconds": seconds, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--new", type=int, default=160, help="most new tokens of an answer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    plain = measure(args.model, {}, args.new)
    pld = measure(args.model, {"speculative.method": "pld", "speculative.k": args.k, "speculative.max_k": args.k}, args.new)
    rows = {}
    for name, row in pld.items():
        later = len(row["tokens"]) - 1
        rows[name] = {
            "prompt_tokens": row["prompt_tokens"],
            "answer_tokens": len(row["tokens"]),
            "same_answer": row["tokens"] == plain[name]["tokens"],
            "mean_accepted_length": 1 + row["accepted"] / max(1, row["verifications"]),
            "tokens_a_step": later / max(1, row["steps"]),
            "ms_a_token": row["seconds"] / later * 1e3,
            "ms_a_token_plain": plain[name]["seconds"] / (len(plain[name]["tokens"]) - 1) * 1e3,
            **{key: row[key] for key in ("steps", "verifications", "drafted", "accepted", "text")},
        }
        shown = " ".join(f"{key} {value:.2f}" for key, value in rows[name].items() if isinstance(value, float))
        print(f"{name:20} {rows[name]['answer_tokens']:4} tokens  same {rows[name]['same_answer']}  {shown}")
    print(f"all: mean accepted length {1 + _sum(rows, 'accepted') / max(1, _sum(rows, 'verifications')):.2f}")
    report.write(args.json, {"model": args.model, "k": args.k, "tasks": rows, **report.environment()})


def _sum(rows: dict[str, dict[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows.values())


if __name__ == "__main__":
    main()
