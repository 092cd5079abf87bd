"""A file of kernel tests as one test, which runs that file under Triton's interpreter in a process of its own.

To pytest it stays a file, and the test stands in it: workers of pytest-xdist share files out, and the interpreter's are long.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIMIT = 600
"""Seconds of a file."""
SETTINGS = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class InterpretedFile(pytest.Module):
    """Not imported in this process, where its kernels would be compiled."""

    def collect(self) -> list[pytest.Item]:
        return [InterpretedTests.from_parent(self, name="under_the_interpreter")]


class InterpretedTests(pytest.Item):
    def runtest(self) -> None:
        # Without this run's own options: no second report, no workers of workers.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        line = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path.relative_to(ROOT))]
        command, environ = [sys.executable, *line], environ | SETTINGS
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode:
            again = " ".join([*(f"{name}={value}" for name, value in SETTINGS.items()), "python", shlex.join(line)])
            pytest.fail(f"exit status {done.returncode}: {again}\n{done.stdout}{done.stderr}", pytrace=False)

    def reportinfo(self) -> tuple[os.PathLike[str], int | None, str]:
        return self.path, None, f"{self.path.stem} under Triton's interpreter"
