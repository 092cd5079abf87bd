"""How a download shows itself: a bar on a terminal, a line every few seconds elsewhere, always on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE_EVERY = 5.0


class Progress(Protocol):
    """Called now and then while something long runs."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `what`; total 0 means unknown (then it is a message, shown once)."""
        ...


def megabytes(count: float) -> str:
    """Decimal megabytes or gigabytes, as download sizes are usually given."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress, or the console's if it gave none."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with _bar() as bar:
            yield bar
    else:
        yield _Lines()


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress as RichProgress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if not total:
                bar.console.print(what)
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=min(done, total))

        yield report


class _Lines:
    """Plain lines: the first and the last of each thing, and one every few seconds between."""

    def __init__(self) -> None:
        self._what = ""
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if not total:
            print(what, file=sys.stderr, flush=True)
        elif what != self._what or now - self._last >= _LINE_EVERY or done >= total:
            self._what, self._last = what, now
            print(f"{what}: {megabytes(done)} of {megabytes(total)}", file=sys.stderr, flush=True)
