"""The whole lossless matrix, in pieces: runs cells that the record does not have yet, until its time is up.

    PYTHONPATH=tests python -m speculation.matrix --record FILE --seconds 280     # again and again, until it says "all"

A line of the record is a cell of a proposer, with what was wrong, or nothing. Cells with the most drafts and requests come
last, so that what is wrong shows early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import traceback
from pathlib import Path

from .lossless import ALL, METHODS, STRATEGIES, Cell, Subject, check, subject


def run(made: dict[str, Subject], method: str, cell: Cell) -> str:
    """What was wrong with a cell; nothing if all is as it should be."""
    if method not in made:
        made[method] = subject(Path(tempfile.mkdtemp()), method)
    for strategy in STRATEGIES:
        try:
            asyncio.run(check(made[method], cell, strategy))
        except Exception:
            return f"{strategy}: {traceback.format_exc(limit=-3)}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--method", choices=METHODS, help="this one alone")
    args = parser.parse_args()
    started = time.monotonic()
    args.record.touch()
    lines = [json.loads(line) for line in args.record.read_text().splitlines()]
    done = {(line["method"], line["cell"]) for line in lines}
    cells = sorted(ALL, key=lambda cell: (cell.batch, cell.k))
    # One proposer after the other for each batch: a model is made once a piece.
    methods = [args.method] if args.method else METHODS
    left = [(m, c) for batch in (1, 7, 32) for m in methods for c in cells if c.batch == batch and (m, str(c)) not in done]
    made: dict[str, Subject] = {}
    longest = 0.0
    with args.record.open("a") as record:
        for method, cell in left:
            before = time.monotonic()
            if before - started + longest > args.seconds:
                break
            wrong = run(made, method, cell)
            longest = max(longest, time.monotonic() - before)
            lines.append({"method": method, "cell": str(cell), "wrong": wrong})
            record.write(json.dumps(lines[-1]) + "\n")
            record.flush()
    wrong_cells = [line for line in lines if line["wrong"]]
    of = len(methods) * len(ALL)
    print(f"{'all' if len(lines) >= of else len(lines)} of {of} cells, {len(wrong_cells)} wrong")
    for line in wrong_cells:
        print(line["method"], line["cell"], line["wrong"])


if __name__ == "__main__":
    main()
