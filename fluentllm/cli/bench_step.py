"""`fluent bench step`: a table of what one decode step spends its time on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output

if TYPE_CHECKING:
    from ..core.settings import Settings


def register(bench: typer.Typer) -> None:
    bench.command()(step)


@options.configured(options.ENGINE)
def step(
    settings: Settings,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode.")] = 32,
    ctx: Annotated[int, typer.Option(min=1, help="Prompt tokens of each.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are looked at.")] = 16,
    json: output.FiguresFile = None,
) -> None:
    """Each kernel of a decode step: time, count, bytes, FLOPs, share of the roofline. On a CPU each operation."""
    from ..bench import report
    from ..local import LocalEngine

    with LocalEngine(settings) as local:
        from ..bench import step as steps_of  # torch, which an engine must have prepared for

        figures = steps_of.measure(local, batch, ctx, steps)
        typer.echo(f"{local.model_name} on {local.engine.info.device}, batch {batch}, ctx {ctx}, one decode step:")
        synthetic = local.engine.info.synthetic
        output.mark(synthetic)
        for line in steps_of.lines(figures):
            typer.echo(line)
    report.write(json, {"model": settings.model.name, "step": figures, **report.environment(synthetic)})
