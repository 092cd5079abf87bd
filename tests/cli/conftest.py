"""Runs `fluent` as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

Fluent = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fluent() -> Fluent:
    """`fluent("config", "show", FLUENT_SERVER__PORT="9")`; without third-party plugins unless FLUENT_PLUGINS names some."""

    def run(*arguments: str, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FLUENT_")}
        environment = {**clean, "FLUENT_PLUGINS": "", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", **environ}
        line = [sys.executable, "-m", "fluentllm.cli", *arguments]
        result = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run
