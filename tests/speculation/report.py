"""docs/losslessness.md: what the tests of a run compared, as a table."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "losslessness.md"
MATRIX = Path(__file__).with_name("matrix.json")
"""What the last runs of `matrix.py` found, by hand."""
COLUMNS = ("pld", "mtp", "eagle", "eagle3")

HEAD = """# Losslessness, feature by feature

Written by `tests/speculation/test_lossless.py`, which fails if this page is not what it found;
`UPDATE_DOCS=1 pytest tests/speculation/test_lossless.py` writes it. *equal*: in deterministic mode, in float32, the answer with
speculation is that without, token for token (and logprob for logprob, with the same reason to end), in every combination that
was run. By default a covering set of K, overlap depth, batch and situation is run; `-m full` runs all of their product, and
`tests/speculation/matrix.py` does so in pieces.

Proposers: `pld`, `mtp` (a DeepSeek-V3 with an MTP layer), `eagle` (on grouped heads) and `eagle3` (on MLA), each on a tiny
random model. Each is run with its own drafts, which are compared with those of a reference that recomputes everything from
scratch, and with drafts in their place that are all right, all wrong, wrong at a varying place, or one token again and again;
accepted counts are checked step by step. Answers of the API come from the same models behind a tokenizer and a chat template,
each whole and streamed, all at once; structured outputs and calls of tools by `grammar_xgrammar`. There is no list of bad
words: a `logit_bias` of -100 forbids tokens. Requests that one engine computes and another continues are compared in
`tests/disaggregation/test_speculation.py`. `tests/speculation/test_lossless_trained.py` does the same on models that were
trained: `longcat-nano` and `longcat-nano-ngram` with their MTP layers, SmolLM2 with its EAGLE-3 head, prompt lookup on two.
"""


class Report:
    """Fed by tests; a row is a feature or a value of an axis, a column a proposer."""

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, dict[str, set[bool]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))

    def saw(self, section: str, row: str, column: str, equal: bool) -> None:
        self._cells[section][row][column].add(equal)

    def complete(self, rows: dict[str, list[str]]) -> bool:
        """Whether all rows have all columns: else only some of the tests were run."""
        return all(column in self._cells[section][row] for section in rows for row in rows[section] for column in COLUMNS)

    def text(self, rows: dict[str, list[str]]) -> str:
        out = [HEAD]
        for section, names in rows.items():
            out.append(f"## {section}\n")
            out.append("| | " + " | ".join(f"`{column}`" for column in COLUMNS) + " |")
            out.append("| --- |" + " --- |" * len(COLUMNS))
            for name in names:
                found = [self._cells[section][name][column] for column in COLUMNS]
                out.append(f"| {name} | " + " | ".join("equal" if cell == {True} else "**differs**" for cell in found) + " |")
            out.append("")
        return "\n".join(out)


HEADING = "## The whole matrix"
ABOUT = """Every K × overlap depth × batch × situation with every kind of drafts, run by hand: trained models take a night.
A row says what was so on that day: of so many *cells* so many were *run*, and so many of these *equal*. The tests run a part.
"""


def with_matrix(page: str, found: dict[str, Any]) -> str:
    """The page with what `matrix.json` says in place of what it said before: the last part of it."""
    out = [page.partition(HEADING)[0].rstrip() + f"\n\n{HEADING}\n"]
    out.append(ABOUT)
    for run in found.values():
        first, last = run["first"][:10], run["last"][:10]
        when = first if first == last else f"{first} to {last}"
        machines = "; ".join(_machine(**machine) for machine in run["machines"])
        out.append(f"`{run['command']}`, {when}; {machines}; drafts: {', '.join(run['strategies'])}.\n")
        out.append("| | cells | run | equal |")
        out.append("| --- | --- | --- | --- |")
        for name, row in run["rows"].items():
            out.append(f"| {name} | {run['cells']} | {row['run']} | {row['equal']} |")
        out.append("")
    return "\n".join(out)


def _machine(versions: dict[str, str], device: dict[str, Any]) -> str:
    gpu = f", {device['gpu']}" if "gpu" in device else ""
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device['cpu']}, {device['cores']} cores, {device['cpu_capability']}{gpu}; {installed}"
