"""Runs the kernel tests of this folder under Triton's interpreter: each file in a process, with a limit of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel tests of this folder run on the GPU itself")
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("test_kernel_*.py")))
def test_kernels_agree_with_their_references_under_the_interpreter(file: str) -> None:
    # Without this run's own options: no second report, no workers of workers.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, env=environ, cwd=HERE.parents[2], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
