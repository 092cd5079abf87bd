"""docs/losslessness.md: what the tests of a run compared, as a table."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "losslessness.md"
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
