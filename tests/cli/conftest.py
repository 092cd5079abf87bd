"""Runs `fluent` as a user does: most tests in this process, which is quick; some in one of their own, which is the truth."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest

from fluentllm import cli

Result = subprocess.CompletedProcess[str]
Fluent = Callable[..., Result]


def environment(**environ: str) -> dict[str, str]:
    """Without third-party plugins unless FLUENT_PLUGINS names some."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLUENT_")}
    return {**clean, "FLUENT_PLUGINS": "", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", **environ}


def check(result: Result, code: int) -> Result:
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def fluent() -> Fluent:
    """`fluent("config", "show", FLUENT_SERVER__PORT="9")` → exit code (which must be `code`), output, errors."""

    def run(*arguments: str, code: int = 0, **environ: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, environment(**environ), clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as exit_,
        ):
            cli.main(list(arguments))
        return check(Result(arguments, exit_.value.code or 0, out.getvalue(), err.getvalue()), code)

    return run


@pytest.fixture(scope="session")
def fluent_process() -> Fluent:
    """The same in a process of its own."""

    def run(*arguments: str, code: int = 0, **environ: str) -> Result:
        line = [sys.executable, "-m", "fluentllm.cli", *arguments]
        result = subprocess.run(line, env=environment(**environ), capture_output=True, text=True, check=False, timeout=60)
        return check(result, code)

    return run
