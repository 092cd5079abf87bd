"""Every program of benchmarks/ can be started: what it names of the package is still there."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

PROGRAMS = sorted(
    path for path in (Path(__file__).parents[2] / "benchmarks").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_says_how_it_is_called(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `python program --help` has it; modules beside it go with it, since other folders have some of the same name.
    monkeypatch.setattr(sys, "path", [str(program.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    before, said = set(sys.modules), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
            runpy.run_path(str(program), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if str(program.parent) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    assert end.value.code in (0, None)
    assert "usage:" in said.getvalue().lower()
