"""`fluent run JOB.yaml`: an offline job with a progress bar; run it again after a kill and it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def run(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: input, output, sampling, settings.")],
    sets: options.Sets = None,
) -> None:
    """Run prompts or chats from a JSONL file, results to another, in order.

    A killed run loses nothing: the same command goes on after the last result that was written.
    """
    from ..jobs.job import load_job
    from ..jobs.output import OutputFile, count_failed, fingerprint
    from ..jobs.run import count_lines, run_job
    from ..local import LocalEngine

    job, section = load_job(job_file)
    settings = options.load(section, sets=sets).settings
    total = count_lines(job.input)
    with OutputFile(Path(job.output), fingerprint(job, settings)) as output:
        if output.done:
            typer.echo(f"{output.done} of {total} lines are done already", err=True)
        if output.done < total:
            with LocalEngine(settings, lambda line: typer.echo(line, err=True)) as local, Progress(total, output.done) as bar:
                queue = settings.scheduler.max_waiting
                local.call(run_job(job, output, local.generation, bar.advance, queue=queue))
        failed = count_failed(Path(job.output))
        errors = f", {failed} of them errors" if failed else ""
        typer.echo(f"{output.done} results in {job.output}{errors}", err=True)


class Progress:
    """A bar with tokens a second, on stderr."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]:.1f} tok/s"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total, completed=done, speed=0.0)
        self._tokens = 0

    def advance(self, lines: int, tokens: int) -> None:
        self._tokens += tokens
        elapsed = self._bar.tasks[0].elapsed or 1e-9
        self._bar.update(self._task, advance=lines, speed=self._tokens / elapsed)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def register(app: typer.Typer) -> None:
    app.command()(run)
