"""How commands print: JSON for programs, aligned columns for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

Json = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]


def _in_a_folder(path: Path | None) -> Path | None:
    """Asked before anything is measured."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return path


FiguresFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", callback=_in_a_folder)]


def print_json(value: Any) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the last one runs on. An empty header is left out."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows] if any(header) else rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def mark(synthetic: str | None) -> None:
    """Say that what follows means nothing, where that is so (`ModelInfo.synthetic`)."""
    if synthetic is not None:
        typer.echo(synthetic)


def text(value: Any) -> str:
    """A value as one would write it in a config file."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
