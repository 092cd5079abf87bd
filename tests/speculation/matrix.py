"""The whole lossless matrix, in pieces: runs cells that the record does not have yet, until its time is up.

    PYTHONPATH=tests python -m speculation.matrix --models trained --record FILE --seconds 280

again and again, until it says "all"; then once more with `--publish`, which writes what the record says to docs/losslessness.md
and to `matrix.json` here, from which the test that writes the rest of that page takes it. `--models`: `random`, tiny random
models with each proposer, `trained`, or `trained-gpu`, the same on a GPU in captured programs.

Several at once: `--share 2/14` is the second of fourteen processes, each with a record of its own, which `--publish` takes
together: `--record FILE FILE …`. What other records have, `--record MINE OTHER …`, is not run again.

The record begins with the machine and the versions; then a line is a cell of a proposer, with what was wrong, or nothing. Cells
with the most drafts and requests come last, so that what is wrong shows early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

from fluentllm.bench.report import environment

from . import trained
from .lossless import ALL, METHODS, STRATEGIES, Cell, Subject, check, subject
from .report import MATRIX, PAGE, with_matrix

NAMES = {"random": METHODS, "trained": trained.SUBJECTS, "trained-gpu": trained.SUBJECTS}


@cache
def made(models: str, name: str) -> Subject:
    if models == "random":
        return subject(Path(tempfile.mkdtemp()), name)
    return trained.subject(name) if models == "trained" else trained.subject_on_gpu(name)


def run(models: str, name: str, cell: Cell) -> str:
    """What was wrong with a cell; nothing if all is as it should be."""
    tested = made(models, name)
    if models == "trained-gpu":
        return _wrong(lambda: trained.check_on_gpu(tested, cell))
    for strategy in STRATEGIES:
        if wrong := _wrong(lambda strategy=strategy: check(tested, cell, strategy)):
            return f"{strategy}: {wrong}"
    return ""


def _wrong(test: Callable[[], Coroutine[Any, Any, Any]]) -> str:
    try:
        asyncio.run(test())
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


def read(record: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Machine and versions, and the cells."""
    about, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    return about, lines


def share(text: str) -> tuple[int, int]:
    """ "2/14" → (1, 14)."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2/14, the second of fourteen")
    return int(number) - 1, int(of)


def summary(machines: list[dict[str, Any]], lines: list[dict[str, Any]], models: str, names: tuple[str, ...]) -> dict[str, Any]:
    """What `matrix.json` holds of these models."""
    cells = {name: [line for line in lines if line["method"] == name] for name in names}
    return {
        "first": min(line["date"] for line in lines),
        "last": max(line["date"] for line in lines),
        "command": f"PYTHONPATH=tests python -m speculation.matrix --models {models} --record FILE",
        "cells": len(ALL),
        "strategies": list(STRATEGIES),
        "machines": machines,
        "rows": {name: {"run": len(of), "equal": sum(not line["wrong"] for line in of)} for name, of in cells.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", type=Path, required=True, nargs="+", metavar="FILE", help="written, and others' that are read"
    )
    parser.add_argument("--models", choices=NAMES, default="random")
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--method", help="this one alone")
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N", help="of the cells every Nth, from the Ith on")
    parser.add_argument("--publish", action="store_true", help="write the page, and run nothing")
    args = parser.parse_args()
    names = NAMES[args.models]
    if args.method is not None and args.method not in names:
        parser.error(f"--method is {args.method!r}; it may be {', '.join(names)}")
    started = time.monotonic()
    mine, *others = args.record
    if not mine.exists():
        about = {key: value for key, value in environment().items() if key in ("versions", "device")}
        mine.write_text(json.dumps(about) + "\n")
    records = [read(record) for record in (mine, *others)]
    lines = [line for _, found in records for line in found]
    if args.publish:
        machines = list({json.dumps(about): about for about, _ in records}.values())
        found = json.loads(MATRIX.read_text()) | {args.models: summary(machines, lines, args.models, names)}
        MATRIX.write_text(json.dumps(found, indent=2) + "\n")
        PAGE.write_text(with_matrix(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        return
    done = {(line["method"], line["cell"]) for line in lines}
    cells = sorted(ALL, key=lambda cell: (cell.batch, cell.k))
    # One proposer after the other for each batch: a model is made once a piece.
    chosen = [args.method] if args.method else names
    every = [(m, c) for batch in (1, 7, 32) for m in chosen for c in cells if c.batch == batch]
    first, step = args.share
    left = [(m, c) for m, c in every[first::step] if (m, str(c)) not in done]
    longest = 0.0
    with mine.open("a") as record:
        for name, cell in left:
            before = time.monotonic()
            if longest and before - started + longest > args.seconds:  # but a piece runs one at least
                break
            wrong = run(args.models, name, cell)
            longest = max(longest, time.monotonic() - before)
            lines.append({"method": name, "cell": str(cell), "wrong": wrong, "date": environment()["date"]})
            record.write(json.dumps(lines[-1]) + "\n")
            record.flush()
    wrong_cells = [line for line in lines if line["wrong"]]
    of = len(every)
    print(f"{'all' if len(lines) >= of else len(lines)} of {of} cells, {len(wrong_cells)} wrong")
    for line in wrong_cells:
        print(line["method"], line["cell"], line["wrong"])


if __name__ == "__main__":
    main()
